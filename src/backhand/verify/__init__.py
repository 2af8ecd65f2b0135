"""Proofs of gradients: compare every op, block and model with autograd and finite differences."""
