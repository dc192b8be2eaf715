"""MiniMax-01: embed, scan over the superblocks, norm, head.

A superblock is the smallest run of layers that repeats (seven lightning and one softmax in
MiniMax-Text-01). Its parameters are stacked along a leading 'layers' axis and scanned, so the
program is as long as one superblock whatever the depth. Decay slopes depend on the absolute layer
and are scanned beside the parameters.
"""

import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx import config as configuration
from mmx.config import ModelConfig
from mmx.inference.cache import Cache
from mmx.nn import layers
from mmx.nn.block import KEPT, Execution, LayerStats, Superblock
from mmx.nn.layers import Embedding, Head, ParamSpec, RMSNorm
from mmx.nn.memory import Memory, Slots
from mmx.nn.sequence import Sequence, describe
from pallas_kernels.dispatch import concrete
from sharding import Partition, constrain

Params = dict[str, Any]
Tokens = Int[Array | np.ndarray, "B T"]
Remat = Literal["none", "superblock", "layer"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardOutput:
    """What a forward pass returns.

    Attributes:
      logits: fp32.
      cache: the cache after these tokens; None without one.
      hidden: with `return_hidden`, the embeddings, the output of every layer but the last, and the
        output of the final norm, L + 1 in all.
      aux: router statistics of every layer.
    """

    logits: Float[Array, "B T vocab"]
    cache: Cache | None
    hidden: Float[Array, "layers B T D"] | None
    aux: LayerStats


class _Modules(nnx.Module):
    """The parts of the model; `blocks` is one superblock, of which parameters hold a stack."""

    def __init__(self, config: ModelConfig):
        self.embed = Embedding(config.vocab_size, config.embed_dim)
        self.blocks = Superblock(config)
        self.final_norm = RMSNorm(config.embed_dim, "embed", epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = Head(config.embed_dim, config.vocab_size)


@functools.lru_cache(maxsize=32)
def _modules(config: ModelConfig) -> _Modules:
    return _Modules(config)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Every parameter as a nested dict of ParamSpec: the one description all others derive from."""
    specs = layers.specs(_modules(config))

    def stack(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(
            spec,
            shape=(config.num_superblocks, *spec.shape),
            axes=("layers", *spec.axes),
            inputs=tuple(axis + 1 for axis in spec.inputs),
        )

    specs["blocks"] = jax.tree.map(stack, specs["blocks"])
    return specs


def abstract_params(config: ModelConfig, *, dtype: jnp.dtype | None = None) -> Params:
    """Shapes and dtypes of the parameters; allocates nothing, whatever the size of the model."""
    wanted = jnp.dtype(dtype or jnp.float32)
    return jax.tree.map(lambda spec: spec.abstract(wanted), param_specs(config))


def init_params(
    config: ModelConfig,
    key: jax.Array,
    *,
    dtype: jnp.dtype | None = None,
    shardings: Any = None,
) -> Params:
    """Random parameters: Xavier normal matrices (paper, section 4.2), norm scales of one.

    Args:
      key: a `jax.random.key`; a leaf's values depend on it and on the leaf's name alone.
      dtype: fp32 when None. Router weights are fp32 always.
      shardings: of every parameter (`mmx.placement`): made where they lie, whole on no device, with
        the same values. None makes them on one device.
    """
    wanted = jnp.dtype(dtype or jnp.float32)

    def leaf(path, spec: ParamSpec, sharding=None):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        abstract = spec.abstract(wanted)
        return _init_leaf(leaf_key, abstract.shape, abstract.dtype, spec.std, sharding)

    trees = [param_specs(config), *([] if shardings is None else [shardings])]
    return jax.tree_util.tree_map_with_path(leaf, *trees)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _init_leaf(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float, sharding: Any
) -> jax.Array:
    # Leaf by leaf: one jitted init of the whole tree compiles for minutes.
    values = jnp.ones(shape, dtype)
    if std:
        values = (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return values if sharding is None else jax.lax.with_sharding_constraint(values, sharding)


def count_params(config: ModelConfig) -> tuple[int, int]:
    """Parameters in total, and those a token activates.

    Active counts the experts a token uses and leaves out embedding and head, as the paper does.
    """
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(spec.shape)
        for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(config))
    }
    total = active = 0
    for name, size in sizes.items():
        total += size
        if name.startswith(("embed/", "head/")):
            continue
        per_expert = name.endswith(("moe/gate_proj", "moe/up_proj", "moe/down_proj"))
        share = config.num_experts_per_tok if per_expert else config.num_experts
        active += size * share // config.num_experts
    return total, active


def forward(
    params: Params,
    tokens: Tokens,
    config: ModelConfig,
    *,
    mask: Tokens | None = None,
    segment_ids: Tokens | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
    remat: Remat = "none",
    implementation: str | None = None,
    partition: Partition | None = None,
) -> ForwardOutput:
    """Logits of the next token at every position. Jit it with `config` static, or call it as it is.

    Padding changes nothing: a row gives the logits of the row without it, wherever the padding is.
    Logits at padding have no meaning.

    Args:
      params: from `mmx.load` or `mmx.init_params`; activations have the dtype of the embedding.
      tokens: ids below `config.vocab_size`. An id out of range raises, or gives NaN under jit.
      mask: 1 (or True) for a token, 0 for padding, left, right or in between; of these tokens only.
      segment_ids: ids of packed samples, each one contiguous run of the row; 0 is padding. Samples
        never see each other. With a cache, an id equal to the cache's last one continues it.
      cache: from `mmx.init_cache` or an earlier pass; the tokens follow those it has seen. Writing
        past its slots raises, or gives NaN under jit.
      return_hidden: also return hidden states and router logits.
      remat: what the backward pass recomputes: nothing, each superblock, or each layer.
      implementation: of the kernels ('xla', 'reference'); None is the best on this platform.
      partition: spread the work over devices, with parameters where `mmx.placement` puts them; the
        same numbers. None runs where the arrays are.

    Raises:
      ValueError: tokens, mask or segment ids of the wrong shape, dtype or range; a full cache;
        sizes that the devices of the partition cannot share evenly.
    """
    check_tokens(tokens, config, mask=mask, segment_ids=segment_ids)
    if cache is not None:
        _check_cache(cache, tokens.shape, config)
    return _forward(
        params,
        tokens,
        config,
        mask,
        segment_ids,
        cache,
        return_hidden=return_hidden,
        remat=remat,
        implementation=implementation,
        partition=partition,
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "return_hidden", "remat", "implementation", "partition"),
)
def _forward(
    params,
    tokens,
    config,
    mask,
    segment_ids,
    cache,
    *,
    return_hidden,
    remat,
    implementation,
    partition,
) -> ForwardOutput:
    x, cache, hidden, aux = backbone(
        params,
        tokens,
        config,
        mask=mask,
        segment_ids=segment_ids,
        cache=cache,
        return_hidden=return_hidden,
        remat=remat,
        implementation=implementation,
        partition=partition,
    )
    logits = unembed(params, x, config)
    logits = constrain(logits, "batch", "seq", "vocab", partition=partition)
    return ForwardOutput(logits, cache, hidden, aux)


def unembed(
    params: Params, x: Float[Array, "B T D"], config: ModelConfig
) -> Float[Array, "B T vocab"]:
    """fp32 logits of activations that have been through the final norm.

    `params` may hold the head alone, and of that any part of the vocabulary.
    """
    modules, name = _modules(config), head_name(config)
    with jax.named_scope("head"):
        if config.tie_embeddings:
            return layers.bind(modules.embed, params[name]).attend(x)
        return layers.bind(modules.head, params[name])(x)


def head_name(config: ModelConfig) -> str:
    """Which part of the parameters makes the logits: the embedding where the two are tied."""
    return "embed" if config.tie_embeddings else "head"


def backbone(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    *,
    mask: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
    remat: Remat = "none",
    implementation: str | None = None,
    capacity_factor: float | None = None,
    statistics: bool = False,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, "layers B T D"] | None, LayerStats]:
    """Everything but the head: see `forward`. Returns activations after the final norm.

    `capacity_factor` and `statistics` are for training: see `Execution`.
    """
    if remat not in ("none", "superblock", "layer"):
        raise ValueError(f"remat is {remat!r}; it must be 'none', 'superblock' or 'layer'")
    execution = Execution(
        return_hidden, remat == "layer", implementation, capacity_factor, statistics, partition
    )
    batch, length = tokens.shape
    sequence, advanced = describe((batch, length), mask, segment_ids, cache, partition=partition)
    slots = None
    if cache is not None and advanced is not None:
        arrays = cache.lightning_states, cache.keys, cache.values
        slots = Slots(*arrays, advanced.slot_samples, cache.num_slots)
    x, slots, hidden, stats = trunk(
        params, tokens, config, sequence, slots, execution, remat_superblocks=remat == "superblock"
    )
    if slots is not None and advanced is not None:
        # Under jit nothing can be raised; slots past the end must not become a plausible result.
        x = jnp.where(advanced.num_slots > advanced.max_slots, jnp.nan, x)
        written = {name: getattr(slots, name) for name in ("lightning_states", "keys", "values")}
        advanced = Cache(**{**vars(advanced), **written})
    return x, advanced, hidden, stats


def trunk[M: Memory](
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    sequence: Sequence,
    memory: M | None,
    execution: Execution,
    *,
    remat_superblocks: bool = False,
) -> tuple[Float[Array, "B T D"], M | None, Float[Array, "layers B T D"] | None, LayerStats]:
    """Embedding, superblocks and final norm of tokens that are described already.

    Returns:
      Activations, the memory after these tokens, with `keep_hidden` the hidden states, statistics.
    """
    modules = _modules(config)
    with jax.named_scope("embed"):
        embedded = layers.bind(modules.embed, params["embed"])(
            tokens, partition=execution.partition
        )

    def superblock(carry, scanned):
        x, memory = carry
        block_params, slopes, index = scanned
        block = layers.bind(modules.blocks, block_params)
        x, memory, stats, hidden = block(x, sequence, slopes, memory, index, execution)
        return (x, memory), (stats, hidden)

    if remat_superblocks:
        superblock = jax.checkpoint(superblock, prevent_cse=False, policy=KEPT)
    repeats = config.num_superblocks
    slopes = jnp.asarray(configuration.decay_slopes(config)).reshape(repeats, -1, config.num_heads)
    scanned = (params["blocks"], slopes, jnp.arange(repeats, dtype=jnp.int32))
    (x, memory), outputs = jax.lax.scan(superblock, (embedded, memory), scanned)
    # [superblocks, layers in one, ...] -> [layers, ...]
    stats, inner = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    x = layers.bind(modules.final_norm, params["final_norm"])(x)
    keep = execution.keep_hidden
    hidden = jnp.concatenate([embedded[None], inner[:-1], x[None]]) if keep else None
    return x, memory, hidden, cast(LayerStats, stats)


def check_tokens(
    tokens: Tokens,
    config: ModelConfig,
    *,
    mask: Tokens | None = None,
    segment_ids: Tokens | None = None,
) -> None:
    """Raise ValueError for tokens, a mask or segment ids that the model cannot take.

    Values are only looked at when they are concrete; under jit shapes and dtypes are checked.
    """
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; "
            "they must be integers [batch, length], neither of them 0"
        )
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"{tokens.shape[1]} tokens are more than max_seq_len={config.max_seq_len}; "
            "shorten the sequence or raise max_seq_len in the config"
        )
    for name, array in (("mask", mask), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} has shape {array.shape}; tokens have {tokens.shape}")
    values = concrete(tokens)
    if values is not None:
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= config.vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(
                f"tokens contain the id {wrong}; ids must be in [0, vocab_size={config.vocab_size})"
            )


def _check_cache(cache: Cache, shape: tuple[int, ...], config: ModelConfig) -> None:
    batch = cache.slot_samples.shape[0]
    if batch != shape[0]:
        raise ValueError(f"the cache holds {batch} rows, tokens have {shape[0]}")
    used = concrete(cache.num_slots)
    if used is None:
        return
    if int(used) + shape[1] > cache.max_slots:
        raise ValueError(
            f"the cache has {cache.max_slots} slots, {int(used)} of them used; {shape[1]} more "
            "tokens do not fit: make it larger with init_cache"
        )
    if int(used) + shape[1] > config.max_seq_len:
        raise ValueError(
            f"{int(used) + shape[1]} tokens are more than max_seq_len={config.max_seq_len}"
        )
