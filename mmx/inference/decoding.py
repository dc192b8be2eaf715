"""The two programs of an engine: a chunk of one prompt, and some steps of all running rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmx.config import ModelConfig
from mmx.inference import graphs
from mmx.inference.pool import Pool, spread
from mmx.inference.rows import Chosen, Rows, choose, nothing_chosen
from mmx.model import Params, param_specs, trunk, unembed
from mmx.nn.block import Execution
from mmx.nn.layers import ParamSpec
from mmx.nn.memory import Pages
from mmx.nn.quantized import axes_of
from mmx.nn.sequence import Sequence
from sharding import Partition, constrain, named

PADDED = (32, 64, 128, 256)  # lengths to which the last chunk of a prompt is padded


def chunk_size(left: int, chunk: int) -> int:
    """Tokens of the next chunk of a prompt of which `left` tokens are unread.

    Whole chunks, then powers of two down to 256, then the rest padded to 32, 64, 128 or 256: so
    chunks begin at multiples of 256, and there are few programs.
    """
    while chunk > PADDED[-1] and chunk > left:
        chunk //= 2
    if left >= chunk:
        return chunk
    return next(size for size in PADDED if size >= left)


def place(params: Params, config: ModelConfig, partition: Partition) -> Params:
    """The parameters, spread over the devices of a partition; those that are stay where they are.

    Raises:
      ValueError: a size that the devices cannot share evenly.
    """
    return jax.device_put(params, named(params, param_axes(params, config), partition))


def param_axes(params: Params, config: ModelConfig) -> Any:
    """The logical axes of each array of the parameters."""

    def axes(spec: ParamSpec, leaf: Any) -> Any:
        return axes_of(leaf, spec.axes)

    return jax.tree.map(axes, param_specs(config), params)


@functools.partial(
    jax.jit,
    static_argnames=("config", "implementation", "partition"),
    donate_argnames=("pool",),
    compiler_options=graphs.WHOLE,
)
def prefill(
    params: Params,
    pool: Pool,
    tokens: Int[Array, "C"],
    count: Int[Array, ""],
    row: Int[Array, ""],
    page_row: Int[Array, "N"],
    start: Int[Array, ""],
    *,
    config: ModelConfig,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> tuple[Pool, Float[Array, "vocab"]]:
    """Read the next tokens of a prompt into a row; one program a length C.

    Args:
      tokens: the first `count` are text, the rest padding, which leaves no trace.
      row: whose state is carried on; at `start` 0 it begins at zero, whatever was there.
      page_row: the row's pages.
      start: tokens of the prompt that were read before.
      partition: over whose devices pool and parameters are spread; None for one.

    Returns:
      The pool, and the logits after the last token.
    """
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    sequence = Sequence(
        segment_ids=(index < count).astype(jnp.int32)[None],
        positions=(start + index)[None],
        continues=(start > 0)[None],
        packed=True,
    )
    state = jax.lax.dynamic_slice_in_dim(pool.lightning_states, row, 1, axis=1)
    memory = Pages(state, pool.key_pages, pool.value_pages, page_row[None])
    execution = Execution(implementation=implementation, partition=partition)
    x, memory, _, _ = trunk(params, tokens[None], config, sequence, memory, execution)
    assert memory is not None
    last = jax.lax.dynamic_slice_in_dim(x, count - 1, 1, axis=1)
    states = jax.lax.dynamic_update_slice_in_dim(
        pool.lightning_states, memory.lightning_states, row, axis=1
    )
    pool = spread(Pool(states, memory.key_pages, memory.value_pages), partition)
    logits = unembed(params, last, config)[0, 0]
    return pool, constrain(logits, None, partition=partition)


@functools.partial(
    jax.jit,
    static_argnames=("config", "steps", "implementation", "partition"),
    donate_argnames=("pool", "rows"),
    compiler_options=graphs.BETWEEN_CONDITIONALS,
)
def decode(
    params: Params,
    pool: Pool,
    rows: Rows,
    *,
    config: ModelConfig,
    steps: int,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> tuple[Pool, Rows, Chosen]:
    """Read each running row's last token and choose its next one, several times.

    Rows that do not run keep every bit of their memory, and whatever that holds reaches no other.
    The steps end early where no row runs any more.
    """
    execution = Execution(implementation=implementation, partition=partition)

    def everywhere(tree):
        """Rows and what they choose: every device has them."""
        return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim, partition=partition), tree)

    def unfinished(carry) -> jax.Array:
        i, _, rows, _ = carry
        return (i < steps) & jnp.any(rows.active)

    def step(carry):
        i, pool, rows, chosen = carry
        sequence = Sequence(
            segment_ids=rows.active.astype(jnp.int32)[:, None],
            positions=rows.positions[:, None],
            continues=jnp.ones_like(rows.active),
            packed=True,
        )
        memory = Pages(pool.lightning_states, pool.key_pages, pool.value_pages, rows.page_table)
        tokens = jnp.where(rows.active, rows.tokens, 0)[:, None]
        x, memory, _, _ = trunk(params, tokens, config, sequence, memory, execution)
        assert memory is not None
        rows, new = choose(rows, everywhere(unembed(params, x, config)[:, 0]))
        pool = Pool(memory.lightning_states, memory.key_pages, memory.value_pages)
        return (
            i + 1,
            spread(pool, partition),
            everywhere(rows),
            jax.tree.map(lambda all, one: all.at[i].set(one), chosen, new),
        )

    nothing = nothing_chosen(steps, rows.tokens.size, config.vocab_size)
    _, pool, rows, chosen = jax.lax.while_loop(
        unfinished, step, (jnp.int32(0), pool, rows, nothing)
    )
    return pool, rows, everywhere(chosen)
