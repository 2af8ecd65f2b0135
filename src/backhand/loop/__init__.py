"""Training loop: step, evaluation, checks during a run, state, logging, objectives, rewards."""
