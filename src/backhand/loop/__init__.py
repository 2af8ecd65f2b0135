"""Training loop: step, evaluation, guards, state, logging, objectives, rewards."""
