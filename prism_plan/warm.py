"""``python -m prism_plan.warm``: compile what commands compile at their first use, ahead of it.

The machine code goes to numba's cache, as it does at the first use: see :func:`prism_plan.jit.jit`.
Without a folder for it each process compiles for itself; that is said, and the exit code is 1.
"""

if __name__ == "__main__":
    from prism_plan.cli.warm import main

    main()
