"""Answers as a teacher gives them, which is the model with a longer prompt."""
