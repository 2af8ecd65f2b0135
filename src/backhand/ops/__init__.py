"""The mathematics: one file an op, with forward, backward and reference; they know tensors and nothing else."""
