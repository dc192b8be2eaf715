"""Layers: flax.nnx modules that only declare parameters, and the functions they call."""
