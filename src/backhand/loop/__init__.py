"""The training loop: step, evaluation, guards, state, logging, objectives and rewards."""
