"""The two ways to compute gradients, by hand or by transformers with autograd, and the memory plan of a step."""
