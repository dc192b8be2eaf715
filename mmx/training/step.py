"""One training step: gradients of the micro-batches, the guard, AdamW; one compiled program.

A batch is an array [A, b, T] of A micro-batches of which the first `accumulation`, a traced number,
are used. So batches of any size up to A micro-batches are one program, and nothing but tokens is
paid for the unused rest: 128M of them are 0.5 GB of int32 over all hosts. Feeding the micro-batches
one by one would need a second program and the accumulated gradients as state between the two.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mmx.config import ModelConfig
from mmx.model import Params, Remat, param_specs
from mmx.placement import param_shardings
from mmx.training import metrics as measuring
from mmx.training.losses import BalanceLoss, LossParts, check_batch, loss_parts, next_token_targets
from mmx.training.metrics import Metrics, Sums
from mmx.training.optimizer import OptimizerOptions, make_optimizer
from mmx.training.placement import state_shardings
from mmx.training.schedule import LearningRate
from mmx.training.state import WINDOW, TrainState, judge
from sharding import Partition

Batch = Mapping[str, Array | np.ndarray]
ComputeDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class StepOptions:
    """Everything about a step that is not the model; static.

    Attributes:
      learning_rate: by the number of the step, skipped steps included.
      optimizer: AdamW and clipping.
      balance_loss, balance_coef, z_loss_coef, remat, implementation, capacity_factor, loss_blocks:
        as for `mmx.loss`.
      compute_dtype: of matrices and activations. Norm scales and router weights are used in fp32.
      num_sources: of the data, for the loss of each.
      spike_sigma: a loss or gradient norm so many standard deviations above the window's mean is
        skipped; infinity skips what is not finite alone.
      spike_min_steps: good steps before spikes are looked for; 1 to 128.

    Raises:
      ValueError: a field out of range.
    """

    learning_rate: LearningRate
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    balance_loss: BalanceLoss = "checkpoint"
    balance_coef: float | None = None
    z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    remat: Remat = "none"
    compute_dtype: ComputeDtype = "bfloat16"
    implementation: str | None = None
    loss_blocks: int | None = None
    num_sources: int = 1
    spike_sigma: float = 6.0
    spike_min_steps: int = 32

    def __post_init__(self) -> None:
        dtypes = ", ".join(get_args(ComputeDtype))
        factor, blocks = self.capacity_factor, self.loss_blocks
        ranges = {
            "compute_dtype": (self.compute_dtype in get_args(ComputeDtype), f"one of {dtypes}"),
            "capacity_factor": (factor is None or factor > 0, "above 0, or None"),
            "z_loss_coef": (0 <= self.z_loss_coef < math.inf, "at least 0"),
            "loss_blocks": (blocks is None or blocks >= 1, "at least 1, or None"),
            "num_sources": (self.num_sources >= 1, "at least 1"),
            "spike_sigma": (self.spike_sigma > 0, "above 0"),
            "spike_min_steps": (1 <= self.spike_min_steps <= WINDOW, f"1 to {WINDOW}"),
        }
        for name, (ok, wanted) in ranges.items():
            if not ok:
                raise ValueError(
                    f"StepOptions: {name} is {getattr(self, name)!r}; it must be {wanted}"
                )


@dataclass(frozen=True)
class TrainStep:
    """`step(state, batch, accumulation) -> (state, metrics)`; made by `make_train_step`.

    Attributes:
      config: of the model.
      program: the jitted function of the same arguments, for `lower` and the like.
    """

    config: ModelConfig
    program: Any

    def __call__(
        self, state: TrainState, batch: Batch, accumulation: int | None = None
    ) -> tuple[TrainState, Metrics]:
        """Take one step; `state` is donated and must not be used afterwards.

        Args:
          state: from `init_state` or an earlier step.
          batch: 'tokens' and, as needed, 'labels', 'mask', 'segment_ids' and 'sources' (source of
            each token, -1 for padding), int32 [A, b, T]; see `stack_micro_batches`.
          accumulation: micro-batches to use, the first ones; all A when None.

        Raises:
          ValueError: arrays of the wrong shape or keys, accumulation outside [1, A].
        """
        shape = batch["tokens"].shape if "tokens" in batch else None
        for name, array in batch.items():
            if array.ndim != 3 or array.shape != shape:
                raise ValueError(
                    f"batch: {name!r} has shape {array.shape}, 'tokens' has {shape}; all must be "
                    "[micro-batches, rows, tokens]"
                )
        most = 0 if shape is None else shape[0]
        wanted = most if accumulation is None else int(accumulation)
        if shape is not None and not 1 <= wanted <= most:
            raise ValueError(f"accumulation is {wanted}; the batch has {most} micro-batches")
        return self.program(state, dict(batch), np.int32(wanted))

    @property
    def num_compiles(self) -> int:
        """How many programs there are by now: one for each shape of the batch."""
        return self.program._cache_size()


def make_train_step(
    config: ModelConfig, options: StepOptions, *, partition: Partition | None = None
) -> TrainStep:
    """The jitted training step of a model.

    Gradients are those of the mean over all targets of the step, whatever micro-batch they are in:
    each micro-batch's loss counts by its share of the targets. For cross entropy and z-loss that is
    the gradient of one large batch. The balance loss is a product of two means over tokens, which
    does not add up: it is computed for each micro-batch, and the same shares average it. Parameters
    are cast once a step; gradients are taken in `compute_dtype` and added up in fp32.

    A step that `judge` finds bad, or that has no target at all, changes neither parameters nor the
    optimizer's state, not in a bit; the number of the step goes on, so its batch is gone and the
    learning rate stays in time with the data.

    The metrics are fp32: `loss` (total), `cross_entropy`, `balance_loss`, `z_loss` (without
    coefficients), `num_targets`, `num_tokens` (not padding), `grad_norm` (before clipping),
    `param_norm` and `update_norm` (of all parameters, after the step and of its change),
    `learning_rate`, `skipped` (0 or 1), `skipped_in_a_row`, `num_skipped`; by source
    `loss_by_source` (sum of the targets' losses) and `tokens_by_source` (targets); by layer
    `router_entropy` (nats, mean over tokens), `router_load` (busiest expert over the mean, 1 is
    balance) and `dropped_tokens` (share of the choices dropped); by lightning layer
    `lightning_state_norm` (root mean square of the states after each row's last token).

    Args:
      config: of the model.
      options: of the step.
      partition: of the work; state and gradients lie as `placement.state_shardings` says. None
        leaves that to the compiler, and the work to one device.
    """
    optimizer = make_optimizer(config, options.optimizer)
    shardings = state_shardings(config, options.optimizer, partition)

    def train_step(
        state: TrainState, batch: dict[str, Array], accumulation: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        # Under jit already, so this looks at keys and shapes alone.
        check_batch({n: a[0] for n, a in batch.items() if n != "sources"}, config)
        grads, sums, num_targets = _accumulate(
            state.params, batch, accumulation, config, options, partition
        )
        with jax.named_scope("optimizer"):
            return _update(
                state, grads, sums, num_targets, accumulation, config, options, optimizer
            )

    out_shardings = None if shardings is None else (shardings, None)
    program = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    return TrainStep(config, program)


def stack_micro_batches(
    micro_batches: Sequence[Mapping[str, np.ndarray]], max_accumulation: int
) -> dict[str, np.ndarray]:
    """Micro-batches [b, T] as the batch [A, b, T] of a step, A = `max_accumulation`; rest zeros.

    Raises:
      ValueError: none, too many, or micro-batches whose keys or shapes differ.
    """
    if not 1 <= len(micro_batches) <= max_accumulation:
        raise ValueError(
            f"{len(micro_batches)} micro-batches; there must be 1 to {max_accumulation}"
        )
    shapes = [{name: a.shape for name, a in micro.items()} for micro in micro_batches]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"micro-batch {number} has shapes {shape}; the first has {shapes[0]}")
    batch = {}
    for name, first in micro_batches[0].items():
        batch[name] = np.zeros((max_accumulation, *first.shape), first.dtype)
        np.stack([micro[name] for micro in micro_batches], out=batch[name][: len(micro_batches)])
    return batch


def compute_params(params: Params, config: ModelConfig, dtype: ComputeDtype) -> Params:
    """Master parameters as the step computes with them: matrices in `dtype`, the rest in fp32."""

    def cast(leaf, spec):
        return leaf if spec.fp32 or not spec.std else leaf.astype(dtype)

    return jax.tree.map(cast, params, param_specs(config))


def _accumulate(
    params: Params,
    batch: dict[str, Array],
    accumulation: Int[Array, ""],
    config: ModelConfig,
    options: StepOptions,
    partition: Partition | None,
) -> tuple[Params, Sums, Float[Array, ""]]:
    """fp32 gradients and sums over the first micro-batches, and their number of targets."""
    size = batch["tokens"].shape[0]
    texts = {name: array for name, array in batch.items() if name != "sources"}
    _, counted = jax.vmap(functools.partial(next_token_targets, partition=partition))(texts)
    used = jnp.arange(size) < accumulation
    targets = jnp.where(used, jnp.sum(counted, axis=(1, 2)), 0).astype(jnp.float32)
    num_targets = jnp.sum(targets)
    shares = targets / jnp.maximum(num_targets, 1)
    shardings = None if partition is None else param_shardings(config, partition)
    # Cast once and not in every micro-batch: the gradient of a cast is a cast.
    compute = compute_params(params, config, options.compute_dtype)
    gradient = _micro_batch_gradient(config, options, partition)

    def run(index) -> tuple[Params, Sums]:
        micro = {
            name: jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
            for name, array in batch.items()
        }
        grads, sums = gradient(compute, micro, shares[index])
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return grads, sums

    if size == 1:  # saves a copy of the gradients and a loop
        grads, sums = run(0)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, 0))
        add = lambda index, total: jax.tree.map(jnp.add, total, run(index))  # noqa: E731
        grads, sums = jax.lax.fori_loop(0, accumulation, add, zeros)
    return grads, sums, num_targets


def _micro_batch_gradient(
    config: ModelConfig, options: StepOptions, partition: Partition | None
) -> Callable[[Params, dict[str, Array], Float[Array, ""]], tuple[Params, Sums]]:
    def total(params: Params, texts: dict[str, Array]) -> tuple[Float[Array, ""], LossParts]:
        return loss_parts(
            params,
            texts,
            config,
            balance_loss=options.balance_loss,
            balance_coef=options.balance_coef,
            z_loss_coef=options.z_loss_coef,
            remat=options.remat,
            implementation=options.implementation,
            capacity_factor=options.capacity_factor,
            loss_blocks=options.loss_blocks,
            partition=partition,
        )

    def gradient(params, micro, share):
        texts = {name: array for name, array in micro.items() if name != "sources"}
        (loss, parts), grads = jax.value_and_grad(total, has_aux=True)(params, texts)
        # A micro-batch of padding alone has share 0, and nothing of it may count.
        grads = jax.tree.map(lambda g: share * g.astype(jnp.float32), grads)
        sums = measuring.micro_batch_sums(
            loss, parts, micro.get("sources"), config, share=share, num_sources=options.num_sources
        )
        return grads, sums

    return gradient


def _update(
    state: TrainState,
    grads: Params,
    sums: Sums,
    num_targets: Float[Array, ""],
    accumulation: Int[Array, ""],
    config: ModelConfig,
    options: StepOptions,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """The state after these gradients, and the metrics of the step."""
    grad_norm = optax.tree.norm(grads)
    # Nothing to learn from is nothing to record either; NaN makes it a skipped step.
    judged = jnp.where(num_targets > 0, sums.loss, jnp.nan)
    skip, guard = judge(
        state.guard,
        judged,
        grad_norm,
        sigma=options.spike_sigma,
        min_recorded=options.spike_min_steps,
    )
    rate = options.learning_rate(state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: -rate * u, updates)

    def unless_skipped(new: Any, old: Any) -> Any:
        # A select fuses with the update and stays in place; whatever `new` is, `old` is untouched.
        return jax.tree.map(lambda n, o: jnp.where(skip, o, n), new, old)

    params = unless_skipped(optax.apply_updates(state.params, updates), state.params)
    metrics = measuring.from_sums(sums, config, num_micro_batches=accumulation) | {
        "num_targets": num_targets,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "update_norm": jnp.where(skip, 0, optax.tree.norm(updates)),
        "learning_rate": rate,
        "skipped": skip.astype(jnp.float32),
        "skipped_in_a_row": guard.skipped_in_a_row.astype(jnp.float32),
        "num_skipped": guard.num_skipped.astype(jnp.float32),
    }
    state = TrainState(
        params=params,
        opt_state=unless_skipped(opt_state, state.opt_state),
        step=state.step + 1,
        guard=guard,
        rng=state.rng,
    )
    return state, metrics
