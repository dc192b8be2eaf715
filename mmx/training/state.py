"""What training remembers: one pytree of arrays, and the guard that skips bad steps."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mmx.config import ModelConfig
from mmx.model import Params, abstract_params, init_params
from mmx.nn.quantized import is_quantized
from mmx.training.optimizer import OptimizerOptions, make_optimizer

WINDOW = 128
Initialisation = Literal["xavier", "deepnorm"]
# Below this share of the mean, a spread is taken as this share: in a window of equal losses any
# change at all would be infinitely many sigma.
_LEAST_SPREAD = 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """The last good steps, by which a bad one is known, and how many were bad.

    Attributes:
      losses, grad_norms: of the last 128 steps that were not skipped, in a ring.
      num_recorded: steps recorded so far; the next one goes to num_recorded modulo 128.
      num_skipped: steps skipped so far.
      skipped_in_a_row: steps skipped since the last good one.
    """

    losses: Float[Array, "window"]
    grad_norms: Float[Array, "window"]
    num_recorded: Int[Array, ""]
    num_skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    Attributes:
      params: fp32 master parameters.
      opt_state: of `make_optimizer`; its moments are fp32, its count is of updates made.
      step: steps taken, skipped ones included: the number of the next batch and of its learning
        rate, so that data and schedule never drift apart.
      guard: see `Guard`.
      rng: key data of `jax.random.key`; constant. What is random at a step folds the step in.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    guard: Guard
    rng: UInt32[Array, "2"]


def init_guard() -> Guard:
    """A guard that has seen nothing."""

    # Each leaf a buffer of its own: a step donates them all.
    def zero():
        return jnp.zeros((), jnp.int32)

    def window():
        return jnp.zeros((WINDOW,), jnp.float32)

    return Guard(window(), window(), zero(), zero(), zero())


def init_state(
    config: ModelConfig,
    optimizer: OptimizerOptions,
    seed: int,
    *,
    initialisation: Initialisation = "xavier",
    params: Params | None = None,
    shardings: TrainState | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      config: of the model.
      optimizer: as in the options of the step.
      seed: of the parameters and of the run; below 2^32.
      initialisation: 'xavier', or 'deepnorm' (`deepnorm_scaled`).
      params: begin with these, cast to fp32, instead of random ones. They may be donated with the
        state: keep a copy if they are needed.

      shardings: of the state (`placement.state_shardings`): its arrays are made where they lie,
        whole on no device. None makes them on one.

    Raises:
      ValueError: an unknown initialisation, a seed out of range, or parameters in int8.
    """
    if initialisation not in get_args(Initialisation):
        raise ValueError(f"initialisation is {initialisation!r}; it must be 'xavier' or 'deepnorm'")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^32")
    key = jax.random.key(seed)
    params_key, run_key = jax.random.split(key)
    if params is not None:
        if is_quantized(params):
            raise ValueError("params are in int8, for inference alone; load them without weights=")
        master = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        if shardings is not None:
            master = jax.device_put(master, shardings.params)
    else:
        of_params = None if shardings is None else shardings.params
        master = init_params(config, params_key, shardings=of_params)
        if initialisation == "deepnorm":
            master = deepnorm_scaled(master, config)
    if shardings is None:
        return _state(config, optimizer, master, run_key)
    rest = jax.jit(
        lambda params: dataclasses.replace(_state(config, optimizer, params, run_key), params={}),
        out_shardings=dataclasses.replace(shardings, params={}),
    )
    return dataclasses.replace(rest(master), params=master)


def abstract_state(config: ModelConfig, optimizer: OptimizerOptions) -> TrainState:
    """Shapes and dtypes of a state; allocates nothing, whatever the size of the model."""
    return jax.eval_shape(
        lambda params: _state(config, optimizer, params, jax.random.key(0)),
        abstract_params(config),
    )


def _state(
    config: ModelConfig, optimizer: OptimizerOptions, params: Params, key: jax.Array
) -> TrainState:
    return TrainState(
        params=params,
        opt_state=make_optimizer(config, optimizer).init(params),
        step=jnp.zeros((), jnp.int32),
        guard=init_guard(),
        rng=jax.random.key_data(key),
    )


def deepnorm_scaled(params: Params, config: ModelConfig) -> Params:
    """Xavier parameters scaled as DeepNorm wants them: (8 N)^-1/4 for N layers, 0.199 for 80.

    Scaled are the value and output projections of attention and the matrices of the experts
    (DeepNet, arXiv 2203.00555, section 2.1, decoder-only); queries, keys, gates of lightning
    attention, router, embedding and head are not. MiniMax-01 gives this beta (section 4.2) beside
    the alpha of the residuals, which is `ModelConfig.mlp_alpha` and its like.
    """
    beta = (8 * config.num_layers) ** -0.25
    scaled = ("v_proj", "out_proj", "moe/gate_proj", "moe/up_proj", "moe/down_proj")
    shared = tuple(f"shared_expert/{name}_proj" for name in ("gate", "up", "down"))

    def scale(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("qkv_proj"):  # [..., heads, (q, k, v), head_dim]
            return leaf * jnp.asarray([1, 1, beta], leaf.dtype)[:, None]
        return leaf * jnp.asarray(beta, leaf.dtype) if name.endswith(scaled + shared) else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def judge(
    guard: Guard,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    *,
    sigma: float,
    min_recorded: int,
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to skip this step, and the guard after it.

    Skipped is a step whose loss or gradient norm is not finite, or lies more than `sigma` standard
    deviations above the mean of the window, once that has `min_recorded` entries. Low values are
    never bad. Skipped steps do not enter the window: a spike in it would hide the next one. A level
    that has risen for good is therefore skipped for ever, which the loop ends by stopping after
    so many skipped in a row.
    """
    filled = jnp.minimum(guard.num_recorded, WINDOW)
    used = jnp.arange(WINDOW) < filled
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    for value, window in ((loss, guard.losses), (grad_norm, guard.grad_norms)):
        number = jnp.maximum(filled, 1)
        mean = jnp.sum(jnp.where(used, window, 0)) / number
        variance = jnp.sum(jnp.where(used, jnp.square(window - mean), 0)) / number
        spread = jnp.maximum(jnp.sqrt(variance), _LEAST_SPREAD * jnp.abs(mean))
        bad |= (filled >= min_recorded) & (value > mean + sigma * spread)
    place = guard.num_recorded % WINDOW

    def record(window, value):
        return window.at[place].set(jnp.where(bad, window[place], value))

    skipped = bad.astype(jnp.int32)
    return bad, Guard(
        losses=record(guard.losses, loss),
        grad_norms=record(guard.grad_norms, grad_norm),
        num_recorded=guard.num_recorded + 1 - skipped,
        num_skipped=guard.num_skipped + skipped,
        skipped_in_a_row=(guard.skipped_in_a_row + 1) * skipped,
    )
