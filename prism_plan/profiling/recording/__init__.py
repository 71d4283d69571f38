"""Record the routing of a running model of transformers."""
