"""Training engines and the memory that a step takes."""
