"""`jax.lax.ragged_all_to_all` out of an all-gather, for CPU, which has none."""

import jax
import jax.numpy as jnp


def simulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the documentation of `jax.lax.ragged_all_to_all` says; NaN where sizes disagree."""
    data, begins, sizes, targets = (
        jax.lax.all_gather(array, axis_name)
        for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    devices = data.shape[0]
    here = jax.lax.axis_index(axis_name)
    # [source, slice for this device]
    begins, sizes, targets = (
        array.reshape(devices, devices, -1)[:, here] for array in (begins, sizes, targets)
    )
    place = jnp.arange(operand.shape[0])
    source = jnp.arange(devices)[:, None, None]
    rows = data.at[source, begins[..., None] + place].get(mode="fill", fill_value=jnp.nan)
    inside = place < sizes[..., None]
    landing = jnp.where(inside, targets[..., None] + place, output.shape[0])
    output = output.at[landing].set(rows, mode="drop")
    return jnp.where((sizes.reshape(-1) == recv_sizes).all(), output, jnp.nan)
