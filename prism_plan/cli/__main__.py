"""``python -m prism_plan.cli``."""

from prism_plan.cli.main import main

main()
