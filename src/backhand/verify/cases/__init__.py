"""Proofs, one file per file of ops: its cases and its deliberately wrong versions."""
