"""Weights: checkpoint files, who holds which experts, and how a server loads more of them."""
