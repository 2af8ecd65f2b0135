"""The objectives, a folder for each family. The core reaches them through `objective.registry` alone."""
