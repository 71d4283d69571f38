"""``python -m prism_plan``: the same as the command ``prism-plan``."""

from prism_plan.cli import main

main()
