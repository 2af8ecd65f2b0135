"""Options of a run: dataclasses from which the command line, TOML files and the documentation are made."""
