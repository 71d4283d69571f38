"""Read responses of vLLM that carry their routed experts."""
