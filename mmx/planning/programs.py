"""The programs a plan is of: those of training and inference, with shapes for arrays."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmx.config import ModelConfig
from mmx.inference.cache import Cache, init_cache
from mmx.inference.quantize import Weights, quantize
from mmx.model import Remat, abstract_params, backbone, forward, param_specs, unembed
from mmx.nn.quantized import axes_of
from mmx.planning.topology import Topology
from mmx.planning.walk import Facts, Site
from sharding import MeshConfig, Partition, axis_sizes, named, rules
from sharding.mesh import AXES
from sharding.rules import Rules

Mode = Literal["train", "prefill", "decode"]
# One row of great length, on more devices than there are key heads: heads over `tensor` alone,
# experts over `expert` and `tensor`; the devices of `expert` share their heads.
DECODE = dataclasses.replace(
    rules.SERVING,
    name="decode",
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
)
RULES = {
    "fsdp": rules.FSDP,
    "tensor": rules.TENSOR,
    "expert": rules.EXPERT,
    "long_context": rules.LONG_CONTEXT,
    "serving": rules.SERVING,
    "decode": DECODE,
}


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
      name, config: of the model.
      mode: a training step, a prompt, or the next token of a batch.
      topology, mesh: the machine, and its devices by axes.
      rules: what the axes split.
      seq: tokens a row; for decode those that the memory holds.
      batch: rows of a micro-batch, over all devices.
      accumulation: micro-batches of a step.
      remat: what the backward pass computes again.
      optimizer_dtype: of the first moment.
      capacity_factor: room of each expert in training, and in prefill.
      expert_groups: parts of each device's tokens that go to their experts one after the other.
      weights: of inference.
      dtype: of matrices and activations.

    Raises:
      ValueError: numbers that fit neither the model nor each other.
    """

    name: str
    config: ModelConfig
    mode: Mode
    topology: Topology
    mesh: dict[str, int]
    rules: Rules
    seq: int
    batch: int
    accumulation: int = 1
    remat: Remat = "layer"
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    capacity_factor: float | None = 1.25
    expert_groups: int = 1
    weights: Weights = "bf16"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("seq", "batch", "accumulation", "expert_groups"):
            if getattr(self, field) < 1:
                flag = field.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, field)}; it must be at least 1")
        if self.seq > self.config.max_seq_len:
            raise ValueError(
                f"--seq {self.seq} is more than the longest sequence of {self.name}, "
                f"max_seq_len={self.config.max_seq_len}"
            )
        if self.mode == "train" and self.weights == "int8":
            raise ValueError("--weights int8 is for inference; train with bf16")

    @property
    def tokens(self) -> int:
        """Tokens that a step reads, or a decode step makes."""
        return self.batch * self.accumulation * (1 if self.mode == "decode" else self.seq)


def request(
    *,
    name: str,
    config: ModelConfig,
    mode: Mode,
    topology: Topology,
    mesh: MeshConfig,
    chosen_rules: str = "auto",
    **options: Any,
) -> Request:
    """A request with the mesh laid over the devices and rules that suit it.

    Raises:
      ValueError: as `Request`; the mesh does not fit the devices; unknown mode or rules.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"--mode is {mode!r}; choose train, prefill or decode")
    sizes = axis_sizes(mesh, topology.devices, slices=topology.slices)
    if chosen_rules == "auto":
        chosen_rules = _suitable(mode, sizes, options["batch"])
    if chosen_rules not in RULES:
        raise ValueError(f"--rules is {chosen_rules!r}; choose auto, {', '.join(RULES)}")
    return Request(name, config, mode, topology, sizes, RULES[chosen_rules], **options)


def _suitable(mode: Mode, sizes: dict[str, int], batch: int) -> str:
    """Rules by what there is to split: rows, or where they are few, the sequence."""
    if mode == "decode":
        # Two presets split heads over all of a row's devices, or over `tensor` alone.
        return "decode" if sizes["tensor"] > 1 else "serving"
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    return "expert" if batch % rows == 0 else "long_context"


# ---------------------------------------------------------------- abstract arrays


@dataclass(frozen=True)
class Entry:
    """An array that stays on the devices: of a category ('parameters', 'optimizer', ...)."""

    category: str
    name: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding

    @property
    def device_shape(self) -> tuple[int, ...]:
        return self.sharding.shard_shape(self.shape)

    @property
    def device_bytes(self) -> int:
        return math.prod(self.device_shape) * self.dtype.itemsize

    @property
    def shards(self) -> int:
        """On how many devices its parts differ."""
        return math.prod(self.shape) // max(1, math.prod(self.device_shape))


@dataclass(frozen=True)
class Program:
    """A jitted function, its arguments as shapes with shardings, and what they are.

    Attributes:
      request: what it is for.
      partition: handed to the model.
      function, arguments: `function.trace(*arguments)`.
      entries: the arguments that stay on the devices between calls.
      facts: for `walk.count`.
    """

    request: Request
    partition: Partition
    function: Any
    arguments: tuple[Any, ...]
    entries: list[Entry]
    facts: Facts

    def trace(self) -> Any:
        """The program traced for the chips of the topology, with their kernels."""
        mesh = self.partition.mesh
        abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
        with jax.sharding.use_abstract_mesh(abstract):
            return self.function.trace(*self.arguments)


def abstract_mesh(
    topology: Topology, sizes: dict[str, int], kernels: Literal["own", "countable"]
) -> AbstractMesh:
    """A mesh of devices that are not there.

    With 'own' kernels programs have those that the chip would run; with 'countable' ones those of
    GPUs, which say nothing of what they compute, give way to their XLA forms.
    """
    chip = topology.chip
    named = chip.kind == "tpu" or kernels == "own"
    kind = chip.device_kind if named else "a GPU without kernels"
    device = AbstractDevice(platform=chip.kind, device_kind=kind, num_cores=None)
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, types, abstract_device=device)


def build(
    ask: Request, mesh: Mesh | AbstractMesh | None = None, *, folded: bool = False
) -> Program:
    """The program of a request.

    Args:
      ask: what to plan.
      mesh: None is one of devices that are not there, which can be traced and counted but not
        compiled.
      folded: give the program one layer of each kind in a superblock instead of all of them, which
        is as good for counting and traced several times faster; `Facts.layer_weights` has how many
        each stands for.

    Raises:
      ValueError: sizes that the mesh cannot share evenly.
    """
    mesh = mesh or abstract_mesh(ask.topology, ask.mesh, "countable")
    partition = Partition(mesh, ask.rules, expert_groups=ask.expert_groups)
    config, weights = fold(ask.config) if folded else (ask.config, ())
    facts = Facts(
        layer_weights=weights,
        expert_rows=_expert_rows(ask, partition),
        context=ask.seq if ask.mode == "decode" else 1,
        accumulation=ask.accumulation,
    )
    make = {"train": _train, "prefill": _prefill, "decode": _decode}[ask.mode]
    function, arguments = make(ask, config, partition)
    # What stays on the devices is that of the whole model.
    whole = arguments if not folded else make(ask, ask.config, partition)[1]
    return Program(ask, partition, function, arguments, list(_entries(ask.mode, whole)), facts)


def fold(config: ModelConfig) -> tuple[ModelConfig, tuple[int, ...]]:
    """A config whose superblock has each kind once, and how many layers each stands for."""
    kinds = tuple(dict.fromkeys(config.superblock))
    weights = tuple(config.superblock.count(kind) for kind in kinds)
    return dataclasses.replace(config, layer_kinds=kinds * config.num_superblocks), weights


def _expert_rows(ask: Request, partition: Partition):
    """Rows that the experts of a device take when all experts get the same."""
    tokens = ask.batch * (1 if ask.mode == "decode" else ask.seq)
    choices = tokens * ask.config.num_experts_per_tok
    over = {axis for name in ("batch", "seq", "experts") for axis in partition.axes_of(name)}
    shared = math.prod(partition.mesh.shape[axis] for axis in over)
    # Tokens are cut into groups only where they are exchanged.
    travel = set(partition.axes_of("experts")) & {
        *partition.axes_of("batch"),
        *partition.axes_of("seq"),
    }
    groups = ask.expert_groups if travel else 1

    def rows(site: Site) -> float:
        return choices / shared / groups if site.devices > 1 else choices

    return rows


def _params(ask: Request, config: ModelConfig, partition: Partition) -> Any:
    params = abstract_params(config, dtype=jnp.dtype(ask.dtype))
    if ask.weights == "int8":
        params = jax.eval_shape(lambda tree: quantize(tree, config), params)
    specs = param_specs(config)
    axes = jax.tree.map(lambda spec, leaf: axes_of(leaf, spec.axes), specs, params)
    flat = jax.tree.map(lambda spec, leaf: leaf, specs, params)
    return _placed(flat, named(flat, axes, partition))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _tokens(shape: tuple[int, ...], partition: Partition) -> jax.ShapeDtypeStruct:
    axes = (*(None,) * (len(shape) - 2), "batch", "seq")
    sharding = partition.sharding(axes, shape, name="tokens")
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


# ---------------------------------------------------------------- the three programs


def _train(ask: Request, config: ModelConfig, partition: Partition) -> tuple[Any, tuple]:
    from mmx.training.optimizer import OptimizerOptions
    from mmx.training.placement import state_shardings, with_shardings
    from mmx.training.schedule import warm_up_stable_decay
    from mmx.training.state import abstract_state
    from mmx.training.step import StepOptions, make_train_step

    optimizer = OptimizerOptions(first_moment_dtype=ask.optimizer_dtype)
    options = StepOptions(
        learning_rate=warm_up_stable_decay(
            1000, 2e-4, 2e-5, warm_up_steps=10, decay_steps=100, shape="exponential"
        ),
        optimizer=optimizer,
        capacity_factor=ask.capacity_factor,
        remat=ask.remat,
        compute_dtype=ask.dtype,
    )
    step = make_train_step(config, options, partition=partition)
    state = abstract_state(config, optimizer)
    state = with_shardings(state, state_shardings(config, optimizer, partition))
    batch = {"tokens": _tokens((ask.accumulation, ask.batch, ask.seq), partition)}
    return step.program, (state, batch, jax.ShapeDtypeStruct((), jnp.int32))


def _prefill(ask: Request, config: ModelConfig, partition: Partition) -> tuple[Any, tuple]:
    """The logits after a prompt, its rows and its sequence over all devices."""

    def prefill(params, tokens):
        x, *_ = backbone(
            params,
            tokens,
            config,
            capacity_factor=ask.capacity_factor,
            partition=partition,
        )
        return unembed(params, x[:, -1:], config)

    tokens = _tokens((ask.batch, ask.seq), partition)
    return jax.jit(prefill), (_params(ask, config, partition), tokens)


def _decode(ask: Request, config: ModelConfig, partition: Partition) -> tuple[Any, tuple]:
    """The next token of each row, with a memory of `seq` tokens."""

    def decode(params, tokens, cache):
        out = forward(params, tokens, config, cache=cache, partition=partition)
        return jnp.argmax(out.logits[:, -1], axis=-1), out.cache

    cache = jax.eval_shape(lambda: init_cache(config, ask.batch, ask.seq, jnp.dtype(ask.dtype)))
    heads: dict[str, Any] = dict(
        lightning_states=(None, "batch", "heads", None, None),
        keys=(None, "batch", None, "kv_heads", None),
        values=(None, "batch", None, "kv_heads", None),
        slot_samples=("batch", None),
        num_slots=(),
        num_samples=("batch",),
        segments=("batch",),
        positions=("batch",),
    )
    axes = Cache(**heads)
    cache = _placed(cache, named(cache, axes, partition))
    arguments = (_params(ask, config, partition), _tokens((ask.batch, 1), partition), cache)
    return jax.jit(decode, donate_argnums=2), arguments


# ---------------------------------------------------------------- what stays


def _entries(mode: Mode, arguments: tuple) -> Iterator[Entry]:
    whole = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        number, _, name = name.partition("/")
        sharding = leaf.sharding
        if sharding is None:
            whole = whole or _whole(arguments)
            sharding = whole
        category = _category(mode, number, name)
        yield Entry(category, name or "tokens", leaf.shape, leaf.dtype, sharding)


def _whole(arguments: tuple) -> NamedSharding:
    leaf = next(leaf for leaf in jax.tree.leaves(arguments) if leaf.sharding is not None)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def _category(mode: Mode, number: str, name: str) -> str:
    if mode == "train":
        first = name.split("/")[0]
        if number == "0" and first in ("params", "opt_state"):
            return {"params": "parameters", "opt_state": "optimizer"}[first]
        return "batch"
    if number == "0":
        return "parameters"
    if name.startswith("lightning_states"):
        return "states"
    return "keys and values" if name.startswith(("keys", "values")) else "batch"
