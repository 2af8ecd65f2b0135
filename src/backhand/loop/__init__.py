"""Training loop: steps, evaluations, checks during a run, checkpoints, logging, objectives and rewards."""
