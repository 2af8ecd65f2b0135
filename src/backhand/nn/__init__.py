"""Neural networks: decoder models, LoRA parameters, adapted PyTorch modules, and loading of base models."""
