"""Peers: the same rows through other pipelines, each in a venv of its own, and through this one; wall time against wall time."""
