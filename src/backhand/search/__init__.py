"""Hyper-parameter search with Optuna. Every trial is a run that can be resumed."""
