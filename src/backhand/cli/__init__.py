"""The command line: parses, calls one typed function, maps errors to exit codes."""
