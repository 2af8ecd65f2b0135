"""Supervised fine-tuning on the answers of the rows."""
