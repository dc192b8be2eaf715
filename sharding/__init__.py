"""Spreading arrays over a mesh by the names of their axes. Knows jax and `pallas_kernels` only.

Parameters already carry the names (`mmx.nn.layers.ParamSpec.axes`); mesh, rules and the parallel
forms of the layers are not written yet.
"""
