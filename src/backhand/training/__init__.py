"""Configuration, loop, optimizer, guards, evaluation: everything that makes a run."""
