"""Run directory: checkpoints, status, summary, proofs, locking and interruption."""
