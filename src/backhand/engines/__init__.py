"""Training engines: decoder models by hand, all others through transformers. Also the memory plan of a step."""
