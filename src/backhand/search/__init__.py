"""A search over options of a run: Optuna proposes, and every trial is a run of its own that can be continued."""
