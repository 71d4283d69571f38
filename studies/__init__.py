"""Studies: what the project's tools find about placements, with the numbers."""
