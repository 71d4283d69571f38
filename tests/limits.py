"""How long tests wait for what other processes do."""

#: Only what hangs takes so long. No test may fail because a machine is slow or does other work, so
#: this is no measure of how fast anything should be.
HANG_S = 600.0
