"""Run directories: files, checkpoints, status and summary, and how they are written and read."""
