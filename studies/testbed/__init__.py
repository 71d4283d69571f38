"""Servers on shaped links, all on one machine, and the experiment that runs on them."""
