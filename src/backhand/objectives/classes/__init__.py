"""Labels or a number, by a head on hidden states."""
