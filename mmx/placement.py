"""Where the parameters of a model lie on a mesh: for training, serving and planning alike."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mmx.config import ModelConfig
from mmx.model import param_specs
from mmx.nn.layers import ParamSpec
from sharding import MeshConfig, Partition, make_mesh
from sharding import rules as _rules
from sharding.rules import Row, Rules

RuleName = Literal["fsdp", "tensor", "expert", "long_context", "serving"]
RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        _rules.FSDP,
        _rules.TENSOR,
        _rules.EXPERT,
        _rules.LONG_CONTEXT,
        _rules.SERVING,
    )
}


def make_partition(
    mesh: MeshConfig,
    rules: RuleName | Rules,
    config: ModelConfig,
    *,
    rows: int | None = None,
    seq_len: int | None = None,
    devices: list[Any] | None = None,
) -> Partition | None:
    """The partition of a run; None on one device. All that does not fit is refused here.

    Args:
      mesh: devices along each axis.
      rules: a preset by name, or rules.
      config: of the model.
      rows: of a micro-batch, over all devices.
      seq_len: tokens a row.
      devices: all there are when None.

    Raises:
      ValueError: a mesh that is not as large as the machine, unknown rules, or sizes of the model
        or the batch that the devices cannot share evenly; the message names the nearest that they
        can.
    """
    if isinstance(rules, str):
        if rules not in RULES:
            raise ValueError(f"rules {rules!r}; choose one of {', '.join(get_args(RuleName))}")
        rules = RULES[rules]
    partition = Partition(make_mesh(mesh, devices), rules)
    if partition.mesh.size == 1:
        return None
    param_shardings(config, partition)
    if rows is not None:
        partition.spec(("batch",), (rows,), name=f"micro-batches of {rows} rows")
    split = partition.devices_of("seq")
    if seq_len is not None and split > 1:
        unit = length_unit(config, partition)
        if seq_len % unit:
            axes = " x ".join(f"{axis}={partition.mesh.shape[axis]}"
                              for axis in partition.axes_of("seq"))  # fmt: skip
            below = seq_len // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"rows of {seq_len} tokens: {split} devices ({axes}) share a row in multiples of "
                f"{unit} tokens; the nearest lengths are {nearest}"
            )
    return partition


def length_unit(config: ModelConfig, partition: Partition) -> int:
    """Tokens of which rows have a multiple, for the devices to share them evenly."""
    split = partition.devices_of("seq")
    # A ring gives each device two chunks.
    return split * (2 if split > 1 and "softmax" in config.layer_kinds else 1)


def param_shardings(config: ModelConfig, partition: Partition) -> dict[str, Any]:
    """The sharding of every parameter, as a nested dict.

    Raises:
      ValueError: two axes of a parameter on one of the mesh, or a size that the devices cannot
        share evenly; the message has the name of the parameter.
    """

    def leaf(path, spec: ParamSpec) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return partition.sharding(spec.axes, spec.shape, name=name)

    return jax.tree_util.tree_map_with_path(leaf, param_specs(config))


def parameter_table(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    *,
    dtype: Any = jnp.bfloat16,
    padded: tuple[str, ...] = (),
) -> list[Row]:
    """Every parameter with its shape, how it is split and its bytes on each device.

    Args:
      config: of the model; nothing is allocated, whatever its size.
      mesh: with devices or abstract.
      rules: of the split.
      dtype: of the parameters; what is always fp32 counts as that.
      padded: logical axes to store padded, see `sharding.rules.table`.

    Raises:
      ValueError: see `param_shardings`.
    """
    entries = []
    for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(config)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        entries.append((name, spec.shape, spec.axes, spec.abstract(dtype).dtype.itemsize))
    return _rules.table(entries, mesh, rules, padded=padded)
