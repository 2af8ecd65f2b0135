"""Command line: parse the arguments of a command, call the function of the command, and turn errors into exit codes."""
