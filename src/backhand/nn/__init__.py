"""Decoder engine, LoRA parameters, modules for any network, and loading of base models."""
