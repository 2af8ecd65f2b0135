"""Arithmetic on adapters: combine, inspect, compare and compress them from their factors alone."""
