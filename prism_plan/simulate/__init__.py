"""A discrete-event simulation of a cluster that serves requests under a placement."""
