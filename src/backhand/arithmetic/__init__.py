"""Adapter arithmetic: combine, inspect, compare and compress adapters from their factors alone."""
