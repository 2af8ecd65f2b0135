"""A run's own directory: what stands in it, how it is written, read and kept whole."""
