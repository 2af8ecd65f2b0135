"""Mathematics: one file per op with derivation, forward, backward and reference."""
