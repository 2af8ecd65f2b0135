"""Loggers that people already use, behind one small interface; each is an extra of its name and imported on its own."""
