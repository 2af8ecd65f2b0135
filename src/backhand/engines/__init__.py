"""Training engines: the decoder engine, transformers with autograd, and the memory that a step of each takes."""
