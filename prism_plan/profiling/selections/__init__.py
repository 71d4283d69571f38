"""Read selections one by one: JSON Lines of one request, token and layer each."""
