"""Checks of files and clusters, and what they say of memory and of assumed figures."""
