"""Training engines, and the memory plan of a step."""
