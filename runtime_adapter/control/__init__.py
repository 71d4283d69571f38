"""The control channel of a run: its event log, the scheduler, and the servers' parts in moves."""
