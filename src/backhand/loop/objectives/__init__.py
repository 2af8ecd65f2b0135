"""Objectives: losses that are functions of the log-probabilities of a row's answers."""
