"""A search over the options of a run. Optuna proposes values; every trial is a run that can be resumed."""
