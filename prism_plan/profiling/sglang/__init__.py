"""Read recordings of SGLang: dumps of its recorder, and responses."""
