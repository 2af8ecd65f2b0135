"""Several processes of one run: launcher, rendezvous, heartbeat and the process group that shares each step."""
