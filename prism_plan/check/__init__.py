"""Checks of files, of clusters and of the memory of GPUs; figures that are assumed."""
