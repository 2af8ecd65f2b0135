"""One file of proofs for each file of ops: its cases and its deliberately wrong versions."""
