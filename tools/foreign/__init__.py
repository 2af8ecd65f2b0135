"""Another system's kernels, called in a process of their own; see `tools/foreign_kernels.py`."""
