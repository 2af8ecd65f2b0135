"""Sampling and chat, with or without an adapter."""
