"""The grid of regimes in which the solver `latency` is held against all others."""
