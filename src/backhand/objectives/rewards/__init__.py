"""Rewards of sampled answers."""
