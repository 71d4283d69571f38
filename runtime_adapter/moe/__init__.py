"""A Mixture-of-Experts layer across servers: routing, dispatch, computing, adding up."""
