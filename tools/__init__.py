"""Tools of whoever develops prism-plan; not part of the wheel."""
