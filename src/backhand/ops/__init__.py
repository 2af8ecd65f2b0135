"""Mathematics: one file per op, a function with its derivation, forward, backward and reference."""
