"""Options of a run, for the command line, TOML files and documentation."""
