"""Adapters in formats of other programs and merged models, each verified by reading it back."""
