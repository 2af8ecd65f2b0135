"""Parts of several objectives: losses of answers, heads on hidden states, and texts."""
