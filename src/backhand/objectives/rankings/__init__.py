"""Scores of a document and a query."""
