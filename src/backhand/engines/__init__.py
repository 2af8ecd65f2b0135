"""Training engines, and the memory of a training step."""
