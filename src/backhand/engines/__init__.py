"""Training engines: known models by hand, other causal ones through transformers. Also the memory plan of a step."""
