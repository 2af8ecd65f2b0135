"""Command line: parse arguments, call one typed function, map errors to exit codes."""
