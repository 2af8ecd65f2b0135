"""Command line: parse the arguments of a command, call its Python function, and turn errors into exit codes."""
