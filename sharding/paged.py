"""Keys and values in pages over devices: heads split, and the pages of each row dealt out in turn.

Page n of a row lies on device n mod D of the D that share pages. So each has every D-th page of a
long row, in order, which is a shorter row with a table of its own: it writes and attends to those,
and the outputs are merged by their log-sum-exp in fp32. Queries, table and positions are on all of
them; per layer and call they send each other an output and a log-sum-exp a query and head.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import platform
from sharding.partition import Partition

PAGES = (None, "pages", None, "kv_heads", None)  # logical axes of pages of all layers


def write_and_attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    key_pages: Float[Array, "L P S G K"],
    value_pages: Float[Array, "L P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    layer: Int[Array, ""],
    *,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "L P S G K"], Float[Array, "L P S G K"]]:
    """Put new keys and values into their pages, and attend to all that the queries may see.

    Args:
      q, k, v: of the new tokens.
      key_pages, value_pages: of all layers, with `partition` split as `PAGES` says.
      page_table: pages of each row in order, with D devices page n from the n mod D-th D-th of all.
      positions: of the new tokens; below 0 is padding, which goes nowhere and gives 0.
      layer: whose pages are meant.
      implementation: see `pallas_kernels.paged_attention`.
      partition: None for one device.

    Returns:
      The output, and the pages.

    Raises:
      ValueError: sizes that the devices cannot share evenly, query and key heads split over
        different axes, rows or their tokens split; else as the operation.
    """
    arrays = q, k, v, key_pages, value_pages, page_table, positions, layer
    if partition is None or not partition.splits("pages", "kv_heads"):
        return _attend(*arrays, implementation=implementation)
    if partition.splits("batch", "seq") or partition.axes_of("heads") != partition.axes_of(
        "kv_heads"
    ):
        raise ValueError(
            f"rules {partition.rules.name!r}: attention to pages needs 'batch' and 'seq' whole and "
            "'heads' and 'kv_heads' over the same axes, as 'serving' has them with data=fsdp=1"
        )
    over = partition.axes_of("pages")

    def shard(*arrays):
        if not over:
            return _attend(*arrays, implementation=implementation)
        q, k, v, key_pages, value_pages, page_table, positions, layer = arrays
        count, here = jax.lax.axis_size(over), jax.lax.axis_index(over)
        pages, slots = key_pages.shape[1:3]
        table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % count)))
        table = table.reshape(table.shape[0], -1, count)
        table = jax.lax.dynamic_index_in_dim(table, here, axis=2, keepdims=False) - here * pages
        limits, ours = local_positions(positions, slots, count, here)
        (out, lse), keys, values = _attend(
            q,
            k,
            v,
            key_pages,
            value_pages,
            table,
            limits,
            layer,
            writes=ours,
            merged=False,
            implementation=implementation,
        )
        return merge(out, lse, over).astype(q.dtype), keys, values

    heads = partition.spec((None, None, "heads", None), q.shape, name="queries of paged attention")
    new = partition.spec((None, None, "kv_heads", None), k.shape, name="keys of paged attention")
    pages = partition.spec(PAGES, key_pages.shape, name="pages")
    whole = PartitionSpec()
    run = jax.shard_map(
        shard,
        mesh=partition.mesh,
        in_specs=(heads, new, new, pages, pages, whole, whole, whole),
        out_specs=(heads, pages, pages),
        check_vma=False,
    )
    return run(*arrays)


def local_positions(
    positions: Int[Array, "B T"], slots: int, devices: int, here: Int[Array, ""]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Where queries stand among the pages of one device.

    Returns:
      The last key they may see there, -1 for none; and where their own key goes there, -1 where it
      goes to another device or nowhere.
    """
    at = jnp.maximum(positions, 0)
    page = at // slots
    before = (page - here + devices - 1) // devices  # pages here that lie wholly before this one
    mine = page % devices == here
    own = before * slots + at % slots
    limits = jnp.where(mine, own, before * slots - 1)
    real = positions >= 0
    return jnp.where(real, limits, -1), jnp.where(real & mine, own, -1)


def merge(
    out: Float[Array, "B T H K"], lse: Float[Array, "B T H"], axes: tuple[str, ...]
) -> Float[Array, "B T H K"]:
    """Outputs over disjoint sets of keys on the devices of some axes -> the output over all."""
    top = jax.lax.pmax(lse, axes)
    # Of padding all are -inf: the weights are exp(-inf - 0).
    weight = jnp.exp(lse - jnp.where(top > -jnp.inf, top, 0))
    total = jax.lax.psum(weight, axes)
    summed = jax.lax.psum(out * weight[..., None], axes)
    return summed / jnp.where(total > 0, total, 1)[..., None]


def _attend(
    q, k, v, key_pages, value_pages, page_table, positions, layer, *,
    writes=None, merged=True, implementation,
):  # fmt: skip
    """On one device; keys go to `writes`, or to the positions of the queries."""
    layers, pages, size = key_pages.shape[:3]
    writes = positions if writes is None else writes
    of_token = jnp.take_along_axis(page_table, jnp.maximum(writes, 0) // size, axis=1, mode="clip")
    # Padding goes to a page that does not exist.
    page = jnp.where(writes >= 0, of_token + layer * pages, layers * pages)
    slot = jnp.maximum(writes, 0) % size
    keys, values = (
        _written(old.reshape(layers * pages, *old.shape[2:]), as_held(new, old.dtype), page, slot)
        for old, new in ((key_pages, k), (value_pages, v))
    )
    out = pallas_kernels.paged_attention(
        q,
        keys,
        values,
        page_table + layer * pages,
        positions,
        implementation=implementation,
        return_lse=not merged,
    )
    keys, values = (x.reshape(key_pages.shape) for x in (keys, values))
    return out, keys, values


def _written(
    pages: Float[Array, "P S G K"],
    new: Float[Array, "B T G K"],
    page: Int[Array, "B T"],
    slot: Int[Array, "B T"],
) -> Float[Array, "P S G K"]:
    """Pages with new keys or values, in place; a page that does not exist takes none."""
    if page.size == 1 and platform.target() == "cpu":
        # XLA makes of one write a slice that is updated or not, and on CPUs copies all pages for
        # the choice. Of two, of which the second goes nowhere, it makes a scatter in place.
        page = jnp.pad(page, ((0, 0), (0, 1)), constant_values=pages.shape[0])
        slot = jnp.pad(slot, ((0, 0), (0, 1)))
        new = jnp.pad(new, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return pages.at[page, slot].set(new, mode="drop")


def as_held(new: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Keys or values as pages of this dtype hold them, rounded to nearest.

    fp8 has no infinity: what is larger than its largest number, 448, becomes that and not NaN.
    """
    if jnp.dtype(dtype).itemsize == 1:
        most = float(jnp.finfo(dtype).max)
        new = jnp.clip(new, -most, most)
    return new.astype(dtype)
