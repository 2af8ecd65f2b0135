"""Experiments to learn from: the sine experiment and the paper's analyses."""
