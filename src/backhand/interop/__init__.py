"""Export to formats of other programs and to merged models. Every output is read back and compared."""
