"""Training: losses today; optimizer, step and loop have their room here."""
