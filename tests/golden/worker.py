"""Runs calls of an installed ``prism-plan``; stands alone, for it runs in any commit's venv.

    python -I worker.py PRISM_PLAN CALLS.json PROCESSES [PACKAGE [MODULE:FUNCTION]]

``CALLS.json`` is a list of ``{"folder": ..., "arguments": [...]}``. Each call runs the installed
script in a process of its own, forked from this one, which has imported the libraries already
(numpy, pyarrow, numba and so on): a second a call is saved. With ``PACKAGE`` it has imported all
modules of the project too, and called the function, which compiles: that saves as much again, and
a commit need not be able to. In the folder of a call ``stdout``, ``stderr`` and ``exit`` are left
beside the files that it writes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import traceback

LIBRARIES = (
    *("numpy", "pyarrow", "pyarrow.parquet", "pyarrow.compute", "pandas", "numba", "scipy"),
    *("scipy.optimize", "scipy.sparse", "highspy", "pulp", "networkx", "click", "rich"),
    *("rich.console", "rich.table", "pydantic", "joblib"),
)
#: No call takes longer, but one that hangs; in seconds.
LONGEST_S = 1800


def call(script: str, arguments: list[str], folder: str) -> int:
    """Run the script as Python would, in this process, which ends with it."""
    signal.alarm(LONGEST_S)
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [script, *arguments]
    code: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def preload(package: str) -> None:
    """Import all modules below a package that can be, but those that stand for a function."""
    folders = importlib.import_module(package).__path__
    for found in pkgutil.walk_packages(folders, f"{package}."):
        above, _, name = found.name.rpartition(".")
        if name == "__main__" or callable(getattr(importlib.import_module(above), name, None)):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module(found.name)


def main() -> None:
    """Run all calls, so many at a time."""
    script, plan, processes, *loaded = sys.argv[1:]
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in loaded[:1]:
        preload(name)
    for name in loaded[1:]:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)()
    gc.freeze()  # forks share what there is as long as nobody writes to it
    with open(plan, encoding="utf-8") as stream:
        waiting = json.load(stream)[::-1]
    running: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < int(processes):
            one = waiting.pop()
            number = os.fork()
            if number == 0:
                os._exit(call(script, one["arguments"], one["folder"]))
            running[number] = one["folder"]
        number, status = os.wait()
        with open(os.path.join(running.pop(number), "exit"), "w") as stream:
            stream.write(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
