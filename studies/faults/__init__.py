"""Faults of a running cluster: scripted, drawn at random, of its network, and for an hour."""
