"""Control of a run: its event log, the scheduler that moves experts, and the servers' parts."""
