"""``python -m prism_plan.cli``."""

from prism_plan.cli import main

main()
