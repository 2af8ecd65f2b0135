"""Export: adapters in other programs' formats and merged models, each proved by reading it back."""
