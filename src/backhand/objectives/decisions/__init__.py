"""Questions with a fixed set of answers, and the probability of each."""
