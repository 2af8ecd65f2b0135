"""Runs of several processes: their start, the messages between them, and their signs of life."""
