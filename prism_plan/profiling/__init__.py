"""Readers of recordings: one file per source of traces."""
