"""Measures of what a model can do, beside its loss."""
