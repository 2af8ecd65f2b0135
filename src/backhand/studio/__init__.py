"""A page in the browser for training without a terminal: `backhand studio` and `backhand watch`."""
