"""Files that were made to break things, against the commands that read them: `make fuzz`."""
