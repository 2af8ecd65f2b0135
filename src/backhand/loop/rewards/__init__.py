"""Training on rewards: one model samples answers, functions reward them, and the model trains on them."""
