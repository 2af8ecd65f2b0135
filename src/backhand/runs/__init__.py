"""Reading and writing run directories: checkpoints, status, summary and other files."""
