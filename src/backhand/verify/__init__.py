"""Proofs: every op, block and model against autograd and finite differences."""
