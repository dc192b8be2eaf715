"""Operations on one device and on two: attention of a row, which is split; experts."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

import mmx
from benchmarks.measure import milliseconds
from benchmarks.parts import Emit, short
from benchmarks.sharded_setting import DEVICES, MESHES, Setting, partition_over, trace
from benchmarks.train_memory import GIGA, compiled_GB, device_limit
from mmx.config import decay_slopes
from mmx.nn import layers
from mmx.nn.functional import project_groups, swiglu
from mmx.nn.lightning import LightningAttention
from mmx.nn.sequence import Sequence
from sharding import MeshConfig, Partition, rules
from sharding.attention import lightning_attention, softmax_attention
from sharding.experts import mixture

Sharding = NamedSharding | SingleDeviceSharding


# ---------------------------------------------------------------- arrays, made where they belong


def fill(shape: tuple[int, ...], sharding: Sharding, seed: int, std: float = 0.3) -> jax.Array:
    """Even bf16 noise by hashing the place of each number: no state, and nothing beside it."""

    def make():
        bits = jnp.full(shape, seed * 2654435761 % 2**32, jnp.uint32)
        for axis in range(len(shape)):
            bits = (bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(
                0x9E3779B1
            )
            bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
            bits = bits ^ (bits >> 13)
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
        return (uniform * (std * math.sqrt(12))).astype(jnp.bfloat16)

    return jax.jit(make, out_shardings=sharding)()


def abstract(shape: tuple[int, ...], sharding: Sharding, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def samples(results: Any) -> list[np.ndarray]:
    """Some of each result, along its second axis; nothing is gathered on a device."""

    def some(x: jax.Array) -> np.ndarray:
        x = x[None] if x.ndim == 1 else x
        step = max(1, x.shape[1] // 64)
        parts = {s.index[1].start or 0: s.data for s in x.addressable_shards}
        found = [
            np.asarray(jax.lax.slice_in_dim(parts[begin], 0, None, step, axis=1), np.float32)
            for begin in sorted(parts)
        ]
        return np.concatenate(found, axis=1)

    return [some(x) for x in jax.tree.leaves(results)]


def relative(ours: list[np.ndarray], truth: list[np.ndarray]) -> float:
    pairs = zip(ours, truth, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def compare_two(
    emit: Emit,
    part: str,
    make: Callable[[Partition | None], Callable[..., Any]],
    arguments: Callable[..., list[Any]],
    partition: Partition,
    **about: Any,
) -> dict[int, Any]:
    """A row: an operation on one device and on two; returns the programs, by number of devices.

    Args:
      make: the function, for a partition or None.
      arguments: (partition or None, whether shapes alone) -> its arrays.
    """
    times, seen, programs = {}, [], {}
    for devices, where in ((1, None), (DEVICES, partition)):
        program = jax.jit(make(where)).lower(*arguments(where, True)).compile()
        programs[devices] = program
        arrays = arguments(where, False)
        seen.append(samples(program(*arrays)))
        # Several calls in the queue: the host takes longer to start a program on two devices.
        times[devices] = milliseconds(program, *arrays, batch_ms=500)
        about[f"program{devices}_GB"] = compiled_GB(program)
        del arrays
    emit(part=part, ms_one=times[1], ms_two=times[DEVICES], times=times[1] / times[DEVICES],
         error=relative(seen[1], seen[0]), **about)  # fmt: skip
    return programs


# ---------------------------------------------------------------- one row, its tokens split


def row_sharding(where: Partition | None, axes: tuple[str | None, ...], shape: Any) -> Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if where is None else where.sharding(axes, shape)


ROWS = ("batch", "seq", "heads", None)


def row_arrays(shapes: list[tuple[int, ...]], where: Partition | None, shape_only: bool) -> list:
    """Random [1, T, H, K], split as the partition says."""
    placed = [(shape, row_sharding(where, ROWS, shape)) for shape in shapes]
    if shape_only:
        return [abstract(shape, sharding) for shape, sharding in placed]
    return [fill(shape, sharding, 1 + i) for i, (shape, sharding) in enumerate(placed)]


def lasp(emit: Emit, setting: Setting) -> None:
    partition = partition_over(MeshConfig(fsdp=1, seq=DEVICES), rules.EXPERT)
    text_01 = decay_slopes(mmx.preset("minimax-text-01"))[0]

    def make(name: str, where: Partition | None) -> Callable[..., Any]:
        def attend(q, k, v):
            slopes = jnp.asarray(text_01[: q.shape[2]])
            return lightning_attention(q, k, v, slopes, chunk_size=256, partition=where)

        def both(q, k, v, grad):
            out, pull, state = jax.vjp(attend, q, k, v, has_aux=True)
            return out, state, *pull(grad)

        return {"out": lambda *x: attend(*x)[0], "forward": attend, "both": both}[name]

    for name, tensors in (("out", 3), ("forward", 3), ("both", 4)):
        heads, shapes = fitting(setting, make(name, None), tensors)
        programs = compare_two(
            emit,
            "lasp",
            functools.partial(make, name),
            functools.partial(row_arrays, shapes),
            partition,
            what=name,
            length=setting.lasp_length,
            heads=heads,
        )
        if setting.trace and name == "both":
            arrays = row_arrays(shapes, partition, False)
            trace(emit, setting, "lasp", functools.partial(programs[DEVICES], *arrays))


def fitting(
    setting: Setting, function: Callable[..., Any], tensors: int
) -> tuple[int, list[tuple[int, ...]]]:
    """The most heads with which a function of so many tensors fits one device, and its shapes."""
    heads, shapes = 0, []
    for heads in setting.lasp_heads:
        shapes = [(1, setting.lasp_length, heads, setting.head_dim)] * tensors
        program = jax.jit(function).lower(*row_arrays(shapes, None, True)).compile()
        if compiled_GB(program) < 0.98 * device_limit() / GIGA:
            break
    return heads, shapes


def layer(emit: Emit, setting: Setting) -> None:
    """A whole lightning layer of the model: projections, attention, norm and gate."""
    partition = partition_over(MeshConfig(fsdp=1, seq=DEVICES), rules.EXPERT)
    config, length = setting.config, setting.lasp_length
    module, slopes = LightningAttention(config), decay_slopes(config)[0]
    index = np.arange(length, dtype=np.int32)[None]
    one_row = Sequence(np.ones_like(index), index, continues=None, packed=False)

    def arguments(backward: bool, where: Partition | None, shape_only: bool) -> list:
        specs, tree = jax.tree.flatten(layers.specs(module))
        wide = (1, length, config.embed_dim)
        arrays = [(spec.shape, spec.axes, spec.std) for spec in specs]
        arrays += [(wide, ("batch", "seq", None), 1.0)] * (1 + backward)
        made = []
        for seed, (shape, axes, std) in enumerate(arrays):
            place = row_sharding(where, axes, shape)
            if shape_only:
                made.append(abstract(shape, place))
            elif std:
                made.append(fill(shape, place, seed, std))
            else:
                made.append(jnp.ones(shape, jnp.bfloat16, device=place))
        return [jax.tree.unflatten(tree, made[: len(specs)]), *made[len(specs) :]]

    def make(backward: bool, where: Partition | None) -> Callable[..., Any]:
        def forward(params, x):
            return layers.bind(module, params)(
                x, one_row, jnp.asarray(slopes), None, implementation=None, partition=where
            )

        def both(params, x, grad):
            out, pull, state = jax.vjp(forward, params, x, has_aux=True)
            return out, state, pull(grad)

        return both if backward else forward

    for backward in (False, True):
        programs = compare_two(
            emit,
            "layer",
            functools.partial(make, backward),
            functools.partial(arguments, backward),
            partition,
            what="both" if backward else "forward",
            length=length,
            heads=config.num_heads,
            embed=config.embed_dim,
        )
        for devices, program in programs.items() if setting.trace else ():
            name = f"layer{'_both' if backward else ''}_{devices}"
            arrays = arguments(backward, partition if devices > 1 else None, False)
            trace(emit, setting, name, functools.partial(program, *arrays))
            del arrays


def ring(emit: Emit, setting: Setting) -> None:
    partition = partition_over(MeshConfig(fsdp=1, seq=DEVICES), rules.EXPERT)
    length, (heads, kv_heads) = setting.ring_length, setting.ring_heads
    queries, keys = ((1, length, n, setting.head_dim) for n in (heads, kv_heads))
    cuts = np.sort(np.random.default_rng(1).integers(1, length, length // setting.document))
    documents = 1 + np.searchsorted(cuts, np.arange(length), side="right").astype(np.int32)[None]

    def make(backward: bool, where: Partition | None) -> Any:
        def attend(q, k, v, ids):
            return softmax_attention(q, k, v, segment_ids=ids, partition=where)

        def both(q, k, v, ids, grad):
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
            return out, *pull(grad)

        return both if backward else attend

    def arguments(backward, packed, where, shape_only):
        shapes = [queries, keys, keys, queries][: 3 + backward]
        q, k, v, *grad = row_arrays(shapes, where, shape_only)
        if not packed:
            return [q, k, v, None, *grad]
        place = row_sharding(where, ("batch", "seq"), documents.shape)
        ids = abstract(documents.shape, place, jnp.int32)
        return [q, k, v, ids if shape_only else jax.device_put(documents, place), *grad]

    for packed in (False, True):
        for backward in (False, True):
            compare_two(
                emit,
                "ring",
                functools.partial(make, backward),
                functools.partial(arguments, backward, packed),
                partition,
                what="both" if backward else "forward",
                document=setting.document if packed else length,
                length=length,
                heads=f"{heads}/{kv_heads}",
            )


# ---------------------------------------------------------------- experts


def moe(emit: Emit, setting: Setting) -> None:
    """Forward and backward of a layer's experts, in tokens a second; each way of exchanging."""
    partition = partition_over(*MESHES["expert"])
    config, count = setting.moe, setting.moe_tokens
    axes = {
        "gate_proj": ("experts", "embed", "expert_mlp"),
        "up_proj": ("experts", "embed", "expert_mlp"),
        "down_proj": ("experts", "expert_mlp", "embed"),
    }
    sizes = dict(experts=config.num_experts, embed=config.embed_dim, expert_mlp=config.expert_dim)

    def compute(params, rows, group_sizes):
        def product(x, name):
            return project_groups(x, params[name], group_sizes, implementation=None)

        hidden = swiglu(product(rows, "gate_proj"), product(rows, "up_proj"))
        return product(hidden, "down_proj")

    def timed(where: Partition | None, exchange: Any) -> float:
        devices = 1 if where is None else DEVICES
        rng, shape = np.random.default_rng(0), (devices, count, config.num_experts_per_tok)
        chosen = np.argsort(rng.random((*shape[:2], config.num_experts)), axis=-1)
        chosen = chosen[..., : shape[2]].astype(np.int32)

        def put(array):
            return jax.device_put(array, row_sharding(where, ("batch", "seq"), array.shape[:2]))

        def both(params, x, grad, weights, experts, real):
            def mix(params, x):
                return mixture(
                    x, weights, experts, real, params, param_axes=axes, compute=compute,
                    num_experts=config.num_experts, partition=where, exchange=exchange,
                )[0].astype(x.dtype)  # fmt: skip

            out, pull = jax.vjp(mix, params, x)
            return out, pull(grad)

        params = {}
        for seed, (name, names) in enumerate(axes.items()):
            of = tuple(sizes[axis] for axis in names)
            params[name] = fill(of, row_sharding(where, names, of), seed, std=of[1] ** -0.5)
        wide = (devices, count, config.embed_dim)
        place = row_sharding(where, ("batch", "seq", None), wide)
        x, grad = (fill(wide, place, 10 + i, std=1.0) for i in range(2))
        routing = put(np.full(shape, 0.5, np.float32)), put(chosen), put(np.ones(shape[:2], bool))
        return milliseconds(jax.jit(both), params, x, grad, *routing)

    one = timed(None, None)
    ways = (None, "padded") if jax.default_backend() == "cpu" else (None, "ragged", "padded")
    for exchange in ways:
        about = dict(exchange=exchange or "automatic", experts=config.num_experts,
                     embed=config.embed_dim, hidden=config.expert_dim,
                     tokens_a_device=count)  # fmt: skip
        try:
            two = timed(partition, exchange)
        except Exception as error:  # the other way may work
            emit(part="moe", **about, failed=short(error))
            continue
        emit(part="moe", **about, ms_one=one, ms_two=two, times=DEVICES * one / two)
