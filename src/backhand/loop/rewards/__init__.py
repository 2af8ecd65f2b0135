"""Training on rewards: answers are sampled, judged and learnt from, all with the one model."""
