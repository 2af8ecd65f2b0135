"""Options of a run, for command line, TOML and documentation."""
