"""The store of a run: members and their incarnations, the log, and values that entries refer to."""
