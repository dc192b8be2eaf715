"""Rows that travel between the devices of one mesh axis: those a pair has to exchange, or all.

Of the first, `move`, all devices know the counts beforehand, so that every device works out by
itself where its rows come to lie. Called inside `jax.shard_map`.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.dispatch import accumulation_dtype

AllToAll = Literal["ragged", "padded"]

# Within a host XLA's kernel for GPUs gives each slice of rows one block of 128 threads, which is
# about 2 GB/s on an H200: so many slices to each device keep the network between them busy.
SLICES = 256
MOST_PEERS = 8  # devices for which XLA has that kernel


class Lanes(NamedTuple):
    """Rows on one device by slices, those of device 0 first: n devices with n_s slices each.

    Attributes:
      begins: first row of each slice on this device.
      sizes: its rows.
      targets: its first row on the device at the other end.
    """

    begins: Int[Array, "S"]
    sizes: Int[Array, "S"]
    targets: Int[Array, "S"]


class Way(NamedTuple):
    """What is static about an exchange.

    Attributes:
      axis_name: mesh axis.
      exchange: 'ragged' or 'padded'.
      block: the most rows from one device to another.
      rows: of the buffer that receives.
      rows_back: of the buffer that sends, which receives in the backward pass.
    """

    axis_name: str
    exchange: AllToAll
    block: int
    rows: int
    rows_back: int

    def reverse(self) -> "Way":
        """The way back."""
        return self._replace(rows=self.rows_back, rows_back=self.rows)


def expert_lanes(
    counts: Int[Array, "n E"], device: Int[Array, ""]
) -> tuple[Lanes, Lanes, Int[Array, "E_local"]]:
    """The lanes of rows that are sorted by expert at both ends, with E / n experts a device.

    Args:
      counts: rows that each device has for each expert.
      device: this one.

    Returns:
      The slices this device sends, one for each of all experts; those it receives, one for each
      device and each of its own experts; and the rows of its own experts. They land sorted by
      expert, then by the device they come from.
    """
    devices, experts = counts.shape
    here = experts // devices
    begins = _before(counts, 1)
    totals = jnp.sum(counts, axis=0).reshape(devices, here)
    targets = _before(totals, 1).reshape(experts) + _before(counts, 0)

    def mine(table):
        return jax.lax.dynamic_slice_in_dim(table, device * here, here, 1).reshape(-1)

    there = Lanes(begins[device], counts[device], targets[device])
    return there, Lanes(mine(targets), mine(counts), mine(begins)), totals[device]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def move(way: Way, rows: Float[Array, "M D"], out: Lanes, back: Lanes) -> Float[Array, "R D"]:
    """Send the slices `out`, receive the slices `back`; rows that nobody sends are 0.

    The gradient takes the way back.
    """
    if way.exchange == "ragged":
        pieces = _pieces(way.axis_name, out)
        out, back = _cut(out, pieces), _cut(back, pieces)
        empty = jnp.zeros((way.rows, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, empty, out.begins, out.sizes, out.targets, back.sizes, axis_name=way.axis_name
        )
    devices = jax.lax.axis_size(way.axis_name)
    sent = rows.at[_block_rows(out, devices, way.block, way.rows_back)].get(
        mode="fill", fill_value=0
    )
    came = jax.lax.all_to_all(sent, way.axis_name, 0, 0)
    landed = jnp.zeros((way.rows, rows.shape[1]), rows.dtype)
    return landed.at[_block_rows(back, devices, way.block, way.rows)].set(came, mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_rows(axis_name: str, rows: Float[Array, "M D"]) -> Float[Array, "n*M D"]:
    """The rows of all devices on each; their gradients are added up in fp32 and rounded once."""
    return jax.lax.all_gather(rows, axis_name, tiled=True)


def _gather_backward(axis_name, _, grad):
    wide = grad.astype(accumulation_dtype(grad.dtype))
    return (jax.lax.psum_scatter(wide, axis_name, tiled=True).astype(grad.dtype),)


gather_rows.defvjp(lambda axis_name, rows: (gather_rows(axis_name, rows), None), _gather_backward)


def _pieces(axis_name: str, lanes: Lanes) -> int:
    """Into how many pieces to cut each slice that is sent."""
    devices = jax.lax.axis_size(axis_name)
    alone = platform.target() == "gpu" and jax.process_count() == 1 and devices <= MOST_PEERS
    return max(1, SLICES * devices // lanes.sizes.shape[0]) if alone else 1


def _cut(lanes: Lanes, pieces: int) -> Lanes:
    """The same rows, each slice as so many slices that differ by a row at most."""
    if pieces == 1:
        return lanes
    number = jnp.arange(pieces, dtype=lanes.sizes.dtype)
    least, more = (part[:, None] for part in jnp.divmod(lanes.sizes, pieces))
    before = number * least + jnp.minimum(number, more)
    return Lanes(
        (lanes.begins[:, None] + before).reshape(-1),
        (least + (number < more)).reshape(-1),
        (lanes.targets[:, None] + before).reshape(-1),
    )


def _move_forward(way, rows, out, back):
    return move(way, rows, out, back), (out, back)


def _move_backward(way, lanes, grad):
    out, back = lanes
    return move(way.reverse(), grad, back, out), None, None


move.defvjp(_move_forward, _move_backward)


def _block_rows(lanes: Lanes, devices: int, block: int, missing: int) -> Int[Array, "n block"]:
    """The row of each place in the blocks for the other devices; `missing` where there is none."""
    begins, sizes = lanes.begins.reshape(devices, -1), lanes.sizes.reshape(devices, -1)
    ends = jnp.cumsum(sizes, axis=1)
    place = jnp.arange(block, dtype=jnp.int32)
    # The first slice that ends after a place: an empty one never does.
    find = functools.partial(jnp.searchsorted, side="right")
    lane = jnp.minimum(jax.vmap(find, in_axes=(0, None))(ends, place), sizes.shape[1] - 1)
    first = jnp.take_along_axis(begins - (ends - sizes), lane, axis=1)
    return jnp.where(place < ends[:, -1:], first + place, missing)


def _before(counts: Int[Array, "a b"], axis: int) -> Int[Array, "a b"]:
    """The sum of the entries before each along an axis."""
    return jnp.cumsum(counts, axis=axis) - counts
