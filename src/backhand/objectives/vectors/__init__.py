"""Vectors of texts, for search and duplicates."""
