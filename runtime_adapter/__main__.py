"""``python -m runtime_adapter``."""

from runtime_adapter.cli import main

main()
