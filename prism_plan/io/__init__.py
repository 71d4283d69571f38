"""The formats of our files, one module each: how they are declared, read and written."""
