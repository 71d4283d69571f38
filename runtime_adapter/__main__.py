"""``python -m runtime_adapter``: the same as ``prism-runtime``."""

from runtime_adapter.cli import main

main()
