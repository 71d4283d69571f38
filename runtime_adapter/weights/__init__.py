"""Weights: checkpoint files, the experts that a server holds, and where new ones come from."""
