"""The decoder engine, the LoRA parameters, modules for any net, and loading of base models."""
