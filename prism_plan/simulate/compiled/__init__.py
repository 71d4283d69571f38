"""The compiled engine: its state, its event loop, and the kernels that the loop calls."""
