"""Products of few rows with matrices that are read once."""
