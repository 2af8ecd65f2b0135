"""Memory of a run, predicted before it begins."""
