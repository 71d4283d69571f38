"""Responses of serving engines that carry the routed experts of their tokens."""
