"""Process groups, launcher and heartbeat."""
