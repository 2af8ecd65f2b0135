"""Training loop: steps, evaluations, checks during a run, checkpoints and logging."""
