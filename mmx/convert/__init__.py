"""Checkpoints of others, to and from this project's parameters."""
