"""Spans: runs of layers that a server executes for requests of any home."""
