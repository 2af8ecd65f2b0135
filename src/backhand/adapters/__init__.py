"""Adapters: configuration, target matching, injection into any module, and PEFT files."""
