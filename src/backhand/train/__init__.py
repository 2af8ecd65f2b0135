"""Configuration, loop, optimizer, evaluation, run directory, the demo."""
