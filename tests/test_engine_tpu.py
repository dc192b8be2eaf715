"""The two programs of an engine, compiled for every TPU that libtpu knows, with their kernels."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tpu_compiler import Compile, compile_for_every_tpu, needs_libtpu

import mmx
from mmx.inference import decoding
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.rows import empty_rows
from mmx.model import abstract_params

ROWS, PAGES, PAGE, CHUNK = 4, 16, 256, 512
BF16 = jnp.dtype(jnp.bfloat16)


def compile_cases() -> list[Compile]:
    # One layer of each kind, with heads of the width that the kernels are for.
    config = mmx.ModelConfig(
        vocab_size=512, embed_dim=256, layer_kinds=("lightning", "softmax"), num_heads=4,
        num_kv_heads=2, head_dim=128, rotary_dim=64, num_experts=4, num_experts_per_tok=2,
        expert_dim=256,
    )  # fmt: skip
    params = abstract_params(config, dtype=BF16)
    pool = jax.eval_shape(lambda: init_pool(config, PoolShape(ROWS, PAGES, PAGE, BF16), None))
    rows = jax.eval_shape(lambda: empty_rows(config, ROWS, PAGES // ROWS))
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)

    def there(program, *arguments):
        """Traced for a TPU, of which the kernels ask."""
        with jax.sharding.use_abstract_mesh(mesh):
            return program(*arguments, config=config)

    def number(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    # Without the options for its compiler, which jax takes of the outermost function alone.
    decode = functools.partial(decoding.decode.__wrapped__, steps=2)
    read = (params, pool, number(CHUNK), number(), number(), number(PAGES // ROWS), number())
    # Three products of experts a layer, and of the chunk lightning attention; the XLA forms read
    # pages and the state of a single token.
    return [
        Compile("decode", functools.partial(there, decode), (params, pool, rows), kernels=6),
        Compile("prefill", functools.partial(there, decoding.prefill), read, kernels=7),
    ]


@needs_libtpu
@pytest.mark.slow
def test_compiles_for_every_tpu():
    compile_for_every_tpu(__name__, everything=True)
