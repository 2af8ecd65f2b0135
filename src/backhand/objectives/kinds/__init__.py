"""What several objectives share: losses of answers, heads on hidden states, and texts."""
