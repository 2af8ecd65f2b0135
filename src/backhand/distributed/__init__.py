"""Runs of several processes: process groups, launcher and heartbeat."""
