"""Adapters on their own: combined, inspected, compared and compressed, from their factors."""
