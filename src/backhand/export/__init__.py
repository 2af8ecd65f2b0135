"""What leaves Backhand: adapters in other programs' formats and merged models, each proved by loading it again."""
