"""What a placement means in seconds: a discrete-event simulation of a cluster."""
