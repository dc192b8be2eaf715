"""Lightning attention over a sequence that is split over devices (LASP+, MiniMax-01 section 2.2).

A shard needs one matrix a head from all that lies before it: the state S that enters it. What the
shard i does to a state is known from the shard alone,

    S  ->  exp(-s n_i) S + W_i        W_i: its own state, from zero;  n_i: its number of tokens,

so the W_i are gathered once, and every device adds up those before its own. The number of bytes is
that of the states: it does not depend on the length. The gradient of a state goes the other way,

    G  ->  exp(-s n_i) G + Z_i        Z_i = sum_t exp(-s t) q_t g_t^T, g the gradient of the output,

with one more gather, of the Z_i.

Own states come first and the output second, begun from the state that enters: no output is made
twice, none is corrected (which would read q again, and read, round and write the output again), and
the one backward pass of the kernel gives final gradients. A pass for states alone reads keys and
values and makes no output; on Hopper GPUs it reads only what has not decayed to nothing by the end
of the shard. Z_i is an own state as well: that of the shard read backwards, with q for keys and g
for values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.dispatch import accumulation_dtype
from pallas_kernels.lightning_attention.segments import segment_runs
from sharding.mesh import AxisName


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    axis_name: AxisName,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`pallas_kernels.lightning_attention` of rows that lie in order over the axis `axis_name`.

    Call it inside `jax.shard_map(..., check_vma=False)`; T is the length of a shard. Output, final
    state and gradients are those of the whole rows, wherever segments begin, end or pause.

    Args:
      q, k, v, segment_ids: this device's shard.
      decay_slopes, initial_state: the same on all devices of the axis. `initial_state` enters the
        first shard.
      axis_name: the mesh axis, or axes; the devices along it, n of them, have a shard each. Rows
        and heads may be split over other axes.
      chunk_size, implementation: of the kernel.

    Returns:
      The shard of the output, and the final state of the whole rows, fp32, on every device of the
      axis (`out_specs` leave the axis out of its spec).

    Raises:
      ValueError, NotImplementedError: as the operation on one device.

    Forward it gathers n states a row, and 4 integers if there are segment ids; backward n states,
    and it sums one state if the final state has a gradient.
    """
    kernel = _Kernel(axis_name, chunk_size, implementation)
    decay_slopes = jax.lax.stop_gradient(decay_slopes)
    if jax.lax.axis_size(axis_name) == 1:
        return kernel.attend(q, k, v, decay_slopes, initial_state, segment_ids)
    dtype = accumulation_dtype(v.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[3]), dtype)
    return _attend(kernel, q, k, v, decay_slopes, initial_state.astype(dtype), segment_ids)


@dataclass(frozen=True)
class _Kernel:
    """The static arguments, and the operation on one device with them."""

    axis_name: AxisName
    chunk_size: int | None
    implementation: str | None

    def attend(self, q, k, v, slopes, initial_state, ids):
        return pallas_kernels.lightning_attention(
            q,
            k,
            v,
            slopes,
            initial_state=initial_state,
            segment_ids=ids,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )

    def own_state(self, k, v, slopes, ids, *, reverse: bool = False) -> Float[Array, "B H K V"]:
        """The state that these tokens leave from zero."""
        alone = self.implementation in (None, "pallas_gpu")  # the others have no kernel for it
        return pallas_kernels.lightning_state(
            k,
            v,
            slopes,
            segment_ids=ids,
            reverse=reverse,
            chunk_size=self.chunk_size,
            implementation=self.implementation if alone else "xla",
        )


class _Shards(NamedTuple):
    """What each of the n shards does to a state that reaches it.

    Attributes:
      tokens: how many real tokens it has.
      single: whether these are of one segment, so that what enters also leaves, decayed.
      continues: whether they begin in the segment to which the state belongs; else it is dropped.
    """

    tokens: Int[Array, "n b"]
    single: Bool[Array, "n b"]
    continues: Bool[Array, "n b"]

    def after(self, i, state, own, slopes):
        """The state behind shard i, from the one before it and its own."""
        passes = self.single[i] & self.continues[i]
        return self._decayed(i, state, passes, slopes) + own[i]

    def gradient_before(self, i, gradient, own, slopes):
        """The gradient of the state before shard i, from that of the one behind it and its own."""
        gradient = self._decayed(i, gradient, self.single[i], slopes) + own[i]
        return jnp.where(self.continues[i][:, None, None, None], gradient, 0)

    def _decayed(self, i, state, passes, slopes):
        # exp and not expm1: its rounding counts once a shard, not once a token.
        decay = jnp.exp(-slopes.astype(state.dtype) * self.tokens[i][:, None])
        return jnp.where(passes[:, None, None, None], decay[..., None, None] * state, 0)


def _gather_shards(axis_name: AxisName, length: int, ids: Int[Array, "B T"] | None) -> _Shards:
    n = jax.lax.axis_size(axis_name)
    if ids is None:
        yes = jnp.ones((n, 1), bool)
        return _Shards(jnp.full((n, 1), length), yes, yes)
    real, runs = segment_runs(ids)
    first = jnp.argmax(real, axis=1)
    last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
    # Without real tokens both ends are padding, 0.
    ends = (jnp.take_along_axis(ids, at[:, None], axis=1)[:, 0] for at in (first, last))
    own = jnp.stack([*ends, jnp.sum(real, axis=1), runs[:, -1] == 0], axis=1)
    first, last, tokens, single = jnp.moveaxis(jax.lax.all_gather(own, axis_name), 2, 0)
    # The ends of all shards are a row of ids too: which run of it is each of?
    ends = jnp.stack([first, last], axis=1).reshape(2 * n, -1).T
    _, runs = segment_runs(ends)
    before = jnp.pad(runs[:, 1:-1:2], ((0, 0), (1, 0)))  # a row begins with run 0
    return _Shards(tokens, single != 0, (runs[:, ::2] == before).T)


def _entering(kernel: _Kernel, k, v, slopes, initial_state, ids):
    """The state before this shard as far as the shard continues it, the final one, the shards."""
    axis_name = kernel.axis_name
    n, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    shards = _gather_shards(axis_name, k.shape[1], ids)
    own = jax.lax.all_gather(kernel.own_state(k, v, slopes, ids), axis_name)

    def after(i, state):
        return shards.after(i, state, own, slopes)

    before = jax.lax.fori_loop(0, here, after, initial_state)
    final = jax.lax.fori_loop(here, n, after, before)
    entering = jnp.where(shards.continues[here][:, None, None, None], before, 0)
    return entering, final, shards


def _attend_primal(kernel: _Kernel, q, k, v, slopes, initial_state, ids):
    entering, final, _ = _entering(kernel, k, v, slopes, initial_state, ids)
    return kernel.attend(q, k, v, slopes, entering, ids)[0], final


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(kernel: _Kernel, *arguments):
    q, k, v, slopes, initial_state, ids = (x if x is None else x.value for x in arguments)
    entering, final, shards = _entering(kernel, k, v, slopes, initial_state, ids)

    def attend(q, k, v, state):
        return kernel.attend(q, k, v, slopes, state, ids)

    (out, _), backward = jax.vjp(attend, q, k, v, entering)
    return (out, final), (backward, q, slopes, ids, shards)


def _attend_backward(kernel: _Kernel, saved, gradients):
    backward, q, slopes, ids, shards = saved
    grad_out, grad_final = gradients
    axis_name = kernel.axis_name
    n, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    if isinstance(grad_out, SymbolicZero):
        grad_out = jnp.zeros(grad_out.shape, q.dtype)
    own = kernel.own_state(q, grad_out.astype(q.dtype), slopes, ids, reverse=True)
    # A token reads the state after its own decay.
    own = own * jnp.exp(-slopes.astype(own.dtype))[:, None, None]
    if isinstance(grad_final, SymbolicZero):
        grad_final = jnp.zeros(grad_final.shape, own.dtype)
    else:
        # Every device has returned the final state.
        grad_final = jax.lax.psum(grad_final, axis_name)
    own = jax.lax.all_gather(own, axis_name)

    def before(i, gradient):
        return shards.gradient_before(n - 1 - i, gradient, own, slopes)

    leaving = jax.lax.fori_loop(0, n - 1 - here, before, grad_final)
    *grads, grad_entering = backward((grad_out, leaving))
    # The initial state enters the first shard alone; the others' shares of its gradient are 0.
    return *grads, None, jnp.where(here == 0, grad_entering, 0), None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
