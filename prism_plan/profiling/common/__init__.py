"""What the readers of recordings share."""
