"""Registry of objectives: the facts of each, and the names of its parts."""
