"""Runnable recipes, each a file that reads top to bottom."""
