"""The arrays of a checkpoint by name: what Orbax stores, what must agree, what is restored.

A state may be any tree; it is stored as nested dicts with the names of its paths, so that neither
the classes of the state nor those of the optimizer matter to a checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PARAMS, STATE = "params", "state"
Arrays = dict[str, Any]  # leaves by name, as 'params/embed/weight'


def stored(arrays: Arrays) -> dict[str, dict[str, Any]]:
    """The trees that Orbax stores: item ('params', 'state') to nested dict of arrays."""
    items: dict[str, Arrays] = {PARAMS: {}, STATE: {}}
    for name, leaf in arrays.items():
        if leaf.size:  # Orbax stores no empty arrays
            data = jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf
            items[item_of(name)][name] = data
    return {item: _nest(tree) for item, tree in items.items() if tree}


def read_arrays(folder: Path, wanted: Arrays) -> Arrays:
    """Restore the leaves named in `wanted` onto their shardings."""
    targets: dict[str, Arrays] = {PARAMS: {}, STATE: {}}
    for name, leaf in wanted.items():
        if np.prod(leaf.shape):
            targets[item_of(name)][name] = _target(leaf)
    chosen = {item: ocp.args.StandardRestore(_nest(t)) for item, t in targets.items() if t}
    read: Arrays = {}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(folder, args=ocp.args.Composite(**chosen))
        for item in chosen:
            read |= named(restored[item])

    return {name: _placed(read.get(name), leaf) for name, leaf in wanted.items()}


def _placed(data: jax.Array | None, leaf: Any) -> jax.Array:
    """What was read for a leaf (None for an empty one), as the kind of array that was asked for."""
    sharding = _sharding(leaf)
    if data is None:
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), sharding)
    if sharding is None:
        data = jnp.array(np.asarray(data))  # not committed to the device it was read on
    return (
        jax.random.wrap_key_data(data, impl=_key_impl(leaf.dtype)) if _is_key(leaf.dtype) else data
    )


def _key_impl(dtype: Any) -> Any:
    """The implementation of a key dtype; jax tells it of arrays only, here an abstract one."""
    found: list[Any] = []
    jax.eval_shape(
        lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype)
    )
    return found[0]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore for a leaf: shape, dtype and always a sharding."""
    sharding = _sharding(leaf) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf.dtype):
        data = jax.eval_shape(jax.random.key_data, data)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf must lie; None for anywhere, as for a scalar that no one has placed."""
    return leaf.sharding if getattr(leaf, "committed", True) else None


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def named(tree: Any) -> Arrays:
    """Leaves by the path to them, in the order of the tree.

    Raises:
      ValueError: two leaves with one name, or a name that cannot be one.
    """
    leaves: Arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = "/".join(parts)
        if not all(parts) or any("/" in part or "." in part for part in parts):
            raise ValueError(f"state {name!r}: names of entries must be without '/' and '.'")
        if name in leaves:
            raise ValueError(f"state {name!r}: two entries have this name; rename one")
        leaves[name] = leaf
    return leaves


def item_of(name: str) -> str:
    """Which of the two stored trees a leaf belongs to."""
    return PARAMS if name.split("/")[0] == PARAMS else STATE


def _nest(arrays: Arrays) -> dict[str, Any]:
    """Nested dicts from names; the inverse of `named` for trees of dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in arrays.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return tree


def description(arrays: Arrays) -> dict[str, Any]:
    """Shape and dtype of every leaf, as JSON values."""
    return {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()}


def compare_arrays(folder: Path, wanted: Arrays, saved: Arrays, *, cast: bool = False) -> None:
    """Compare leaves with the description that was saved; with `cast`, floats of any width agree.

    Raises:
      ValueError: naming the first leaf that is missing, unexpected, or of another shape or dtype.
    """
    for name, array in description(wanted).items():
        if name not in saved:
            raise ValueError(f"{folder}: holds no array {name}; give the config it was saved with")
        for field in ("shape", "dtype"):
            ours, theirs = array[field], saved[name][field]
            floats = cast and field == "dtype" and "float" in ours and "float" in theirs
            if ours != theirs and not floats:
                raise ValueError(
                    f"{folder}: {name} was saved with {field} {theirs}, wanted is {ours}; "
                    "give the config it was saved with"
                )
    for name in saved:
        if name not in wanted:
            raise ValueError(
                f"{folder}: holds {name}, which is not wanted; give the config it was saved with"
            )


def compare_config(folder: Path, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare the entries of `wanted` with those saved; others are left alone.

    Raises:
      ValueError: naming the first field that differs, as 'model.embed_dim'.
    """

    def compare(name: str, ours: Any, theirs: Any) -> None:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in sorted({*ours, *theirs}):
                compare(f"{name}.{key}", ours.get(key), theirs.get(key))
        elif ours != theirs:
            raise ValueError(
                f"{folder}: was saved with {name} = {json.dumps(theirs)}, wanted is "
                f"{json.dumps(ours)}; give the config it was saved with, or another folder"
            )

    for key, value in wanted.items():
        compare(key, value, saved.get(key))
