"""When moving experts pays, and in which order they move."""
