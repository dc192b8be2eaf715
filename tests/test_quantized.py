"""Weights in int8: the nearest ones, the same however they are made, and a model that runs on them.

What is right is computed in float64 numpy from the integers and scales themselves.
"""

import math
import tracemalloc

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from conversions import convert, load
from golden_cases import LOGITS, close, golden
from random_models import random_params, random_tokens, small_config
from test_load import assert_same, flat

import mmx
from mmx.inference.engine import Engine
from mmx.inference.quantize import param_bytes, quantize
from mmx.integrity import DamagedCheckpoint
from mmx.nn import functional
from mmx.nn.quantized import Int8, quantized
from mmx.placement import make_partition, param_shardings
from mmx.training.optimizer import OptimizerOptions
from mmx.training.state import init_state
from sharding import MeshConfig

CONFIG = small_config("lsls", shared_expert_dim=8, embed_dim=32)
PARAMS = random_params(CONFIG, 0)
INT8 = quantize(PARAMS, CONFIG)
TOKENS = random_tokens(CONFIG, (2, 24), 0)


def dequantized(tree):
    """The float64 matrices that the integers stand for."""
    if isinstance(tree, dict):
        return {name: dequantized(value) for name, value in tree.items()}
    if isinstance(tree, Int8):
        return truth.wide(tree.values) * truth.wide(tree.scale)
    return truth.wide(tree)


# ---------------------------------------------------------------- matrices


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs", [(0,), (1,), (0, 1), (1, 2)])
def test_the_nearest_integers(dtype, inputs):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((6, 5, 7)) * 10.0 ** rng.integers(-4, 4, (6, 5, 7))).astype(dtype)
    found = quantized(w, inputs)
    assert_same(found, jax.jit(quantized, static_argnums=1)(w, inputs))  # bit for bit
    assert (found.values.dtype, found.scale.dtype) == (np.int8, np.float32)
    w = w.astype(np.float64)
    largest = np.abs(w).max(axis=inputs, keepdims=True)
    # 1 / 127 and the product with it are rounded once each, to 2^-24.
    np.testing.assert_allclose(found.scale, largest / 127, rtol=2**-23)
    # w / scale is up to 127, of which two roundings take at most 127 * 2^-23.
    error = np.abs(w - dequantized(found)) / found.scale
    assert error.max() <= 0.5 + 127 * 2**-23
    assert error.max() > 0.45  # the bound is tight
    np.testing.assert_array_equal(np.abs(found.values.astype(int)).max(axis=inputs), 127)


def test_channels_of_zeros_of_almost_nothing_and_of_no_number():
    w = np.ones((4, 5), np.float32)
    w[:, 1], w[:, 2], w[2, 3], w[:, 4] = 0, 1e-37, np.nan, 1e30
    with np.errstate(invalid="ignore"):  # numpy warns of the NaN
        of_numpy = quantized(w, (0,))
    for found in (of_numpy, jax.jit(quantized, static_argnums=1)(w, (0,))):
        wide = dequantized(found)
        np.testing.assert_array_equal(wide[:, 1:3], 0)  # and not 0 / 0
        assert np.isnan(wide[:, 3]).all()  # none is replaced by a number
        np.testing.assert_allclose(wide[:, [0, 4]], w[:, [0, 4]], rtol=1e-6)


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape", "inputs"),
    [
        ("btd,dchk->btchk", (2, 3, 40), (40, 3, 4, 5), (0,)),
        ("bthk,hkd->btd", (2, 3, 4, 10), (4, 10, 6), (0, 1)),
        ("...d,df->...f", (6, 40), (40, 7), (0,)),
    ],
)
def test_product(subscripts, x_shape, w_shape, inputs, dtype, out_dtype):
    """The sum is made in fp32, scaled in fp32, and rounded once."""
    rng = np.random.default_rng(0)
    w = quantized(rng.standard_normal(w_shape).astype(np.float32), inputs)
    x = jnp.asarray(rng.standard_normal(x_shape), dtype)
    seen = functional.project(subscripts, x, w, out_dtype=out_dtype)
    assert seen.dtype == (out_dtype or dtype)
    wanted = np.einsum(subscripts, truth.wide(x), dequantized(w))
    size = np.einsum(subscripts, np.abs(truth.wide(x)), np.abs(dequantized(w)))
    # 40 additions and a product in fp32; one rounding of the result, to 2^-8 of it, if in bf16.
    rounding = 0 if seen.dtype == jnp.float32 else 2.0**-8
    bound = 42 * 2.0**-24 * size + rounding * np.abs(wanted)
    assert (np.abs(truth.wide(seen) - wanted) <= bound).all()


def test_a_loop_over_tokens_keeps_no_copy_in_another_dtype():
    """XLA casts before the loop what does not change in it, unless it is held back."""
    w = jax.eval_shape(lambda w: quantized(w, (0,)), jax.ShapeDtypeStruct((256, 256), jnp.float32))

    def decode(x, w):
        def step(x, _):
            return functional.project("bd,dk->bk", x, w), x

        return jax.lax.scan(step, x, length=8)

    x = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)
    entry = jax.jit(decode).lower(x, w).compile().as_text().split("ENTRY")[1]
    assert "s8[256,256]" in entry
    assert "bf16[256,256]" not in entry
    assert "f32[256,256]" not in entry


# ---------------------------------------------------------------- the model


def test_which_parameters_are_in_int8():
    """The matrices of attention and experts; their inputs as the checkpoint's rows have them."""
    of_layer = dict(
        lightning={"qkv_proj": 1, "gate_proj": 1, "out_proj": 2},
        softmax={"q_proj": 1, "k_proj": 1, "v_proj": 1, "out_proj": 2},
    )
    for i, kind in enumerate(("lightning", "softmax")):
        found = INT8["blocks"][f"layer_{i}"]
        names = {n for n, leaf in found["attention"].items() if isinstance(leaf, Int8)}
        assert names == set(of_layer[kind])
        for name, inputs in of_layer[kind].items():
            leaf = found["attention"][name]
            ones = (2, *(1,) * inputs, *leaf.values.shape[1 + inputs :])
            assert leaf.scale.shape == ones, name
        for name in ("gate_proj", "up_proj", "down_proj"):
            for owner, experts in ((found["moe"], (4,)), (found["moe"]["shared_expert"], ())):
                shape = owner[name].values.shape
                assert owner[name].scale.shape == (2, *experts, 1, shape[-1]), name
    kept = flat(INT8).keys() & flat(PARAMS).keys()
    assert len(kept) == 3 + 2 * 4 + 1  # of the model, of a layer, of a lightning layer
    assert_same({n: flat(INT8)[n] for n in kept}, {n: flat(PARAMS)[n] for n in kept})


def test_forward_is_the_model_of_the_integers():
    """As exact as the float model: the same bar, that of the golden cases."""
    true = truth.forward(dequantized(INT8), TOKENS, CONFIG)
    close(mmx.forward(INT8, TOKENS, CONFIG).logits, true.logits, LOGITS, "logits")


def test_golden_logits():
    """Near those of the float model: rounding errors of weights add up like noise.

    A weight's error is even within +-scale / 2: 0.29 scale in the root mean square. These narrow
    matrices have max |w| of 2 to 2.5 root mean squares, so that is 0.5 % of a product; the five
    products in a row of each of four layers make 2 %.
    """
    case = golden(checkpoints.RELEASED_BF16)
    params = quantize(case.params, case.config)
    logits = np.asarray(mmx.forward(params, case.tokens, case.config, mask=case.mask).logits)
    wanted = case.arrays["logits"][case.real]
    error = np.sqrt(np.mean((logits[case.real] - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-3 < error < 0.02


def test_generation_is_forward_and_argmax():
    """Of the whole program and of an engine."""
    prompts, new = [TOKENS[0, :9].tolist(), TOKENS[1, :14].tolist()], 6
    wanted = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            padded = np.zeros((2, 24), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = mmx.forward(INT8, padded, CONFIG).logits
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        wanted.append(tokens[-new:])
    engine = Engine(CONFIG, INT8, rows=2, max_seq_len=64, page_size=16)
    results = engine.generate(prompts, max_new_tokens=new, ignore_eos=True)
    assert [list(result.tokens) for result in results] == wanted
    seen = mmx.generate(INT8, np.array(prompts[:1]), CONFIG, max_new_tokens=new)
    np.testing.assert_array_equal(seen, wanted[:1])


def test_training_is_refused():
    with pytest.raises(ValueError, match="params are in int8, for inference alone"):
        init_state(CONFIG, OptimizerOptions(), 0, params=INT8)


# ---------------------------------------------------------------- bytes and devices


def test_bytes_are_those_of_the_arrays():
    found = param_bytes(CONFIG, weights="int8")
    values = {name: leaf.nbytes for name, leaf in flat(INT8).items() if leaf.dtype == np.int8}
    of_experts = sum(size for name, size in values.items() if "/moe/" in name)
    # Two superblocks of two layers; three matrices, 32 x 12 of four experts, 32 x 8 of the shared.
    assert found["experts"] == of_experts == 2 * 2 * 3 * 32 * (4 * 12 + 8)
    assert found["attention"] == sum(values.values()) - of_experts
    scales = [leaf.nbytes for name, leaf in flat(INT8).items() if name.endswith("_proj/scale")]
    assert found["scales"] == sum(scales)
    in_bf16 = param_bytes(CONFIG, weights="bf16")
    assert in_bf16["experts"] == 2 * found["experts"]
    assert in_bf16["attention"] == 2 * found["attention"]
    assert (in_bf16["scales"], in_bf16["rest"]) == (0, found["rest"])
    bf16 = random_params(CONFIG, 0, jnp.bfloat16)
    assert sum(in_bf16.values()) == sum(leaf.nbytes for leaf in flat(bf16).values())
    assert sum(found.values()) == sum(x.nbytes for x in flat(quantize(bf16, CONFIG)).values())


@pytest.mark.parametrize(("name", "layers"), [("slice-8", 8), ("minimax-text-01", 80)])
def test_bytes_of_the_released_width(name, layers):
    found = param_bytes(mmx.preset(name), weights="int8")
    assert found["experts"] == layers * 32 * 3 * 6144 * 9216  # 434.9 GB of 80 layers
    lightning, softmax = layers * 7 // 8, layers // 8
    inner = 64 * 128
    matrices = lightning * 5 * 6144 * inner + softmax * 6144 * (2 * inner + 2 * 8 * 128)
    assert found["attention"] == matrices
    of_experts = 32 * (2 * 9216 + 6144)
    of_lightning, of_softmax = 4 * inner + 6144, inner + 2 * 8 * 128 + 6144
    channels = layers * of_experts + lightning * of_lightning + softmax * of_softmax
    assert found["scales"] == 4 * channels
    with pytest.raises(ValueError, match="weights is 'int4'; it must be 'bf16' or 'int8'"):
        param_bytes(mmx.preset(name), weights="int4")


def test_sharded_parameters_stay_sharded():
    config = small_config("s", embed_dim=32)
    params = random_params(config, 0)
    partition = make_partition(MeshConfig(), "fsdp", config)
    assert partition is not None
    sharded = jax.device_put(params, param_shardings(config, partition))
    found = quantize(sharded, config)
    assert_same(found, quantize(params, config))
    was = sharded["blocks"]["layer_0"]["moe"]["up_proj"]
    now = found["blocks"]["layer_0"]["moe"]["up_proj"].values
    assert now.sharding.is_equivalent_to(was.sharding, was.ndim)
    assert math.prod(now.addressable_shards[0].data.shape) == now.size // 8


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "name",
    [checkpoints.RELEASED, checkpoints.RELEASED_BF16, "text/p08_fused_experts_top1"],
)
def test_load_quantises_as_quantize_does(name):
    folder = checkpoints.GOLDEN / name
    config, params = load(folder)
    assert_same(load(folder, weights="int8")[1], quantize(params, config))


def test_load_of_every_form_and_dtype(tmp_path):
    """Orbax and a run; fp16 and float64; a dtype for the rest, int8 from what is stored."""
    from mmx.training.checkpoint import Checkpoints

    fields = checkpoints.released_fields(shared_intermediate_size=5)
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields), np.float64)
    key = "model.layers.2.self_attn.qkv_proj.weight"  # with layer 0 one parameter of two dtypes
    tensors[key] = tensors[key].astype(np.float16)
    folder = checkpoints.write_folder(tmp_path / "hf", fields, tensors)
    config, params = load(folder)
    wanted = quantize(params, config)
    assert_same(load(folder, weights="int8")[1], wanted)
    rest = load(folder, weights="int8", dtype=jnp.bfloat16)[1]
    assert rest["embed"]["embedding"].dtype == jnp.bfloat16
    assert_same(rest["blocks"]["layer_0"]["moe"]["up_proj"].values,
                wanted["blocks"]["layer_0"]["moe"]["up_proj"].values)  # fmt: skip
    orbax = convert(folder, tmp_path / "orbax", "--to", "orbax", "--dtype", "fp32")
    assert_same(load(orbax, weights="int8")[1], wanted)
    with Checkpoints(tmp_path / "run/checkpoints") as saves:
        saves.save(3, {"params": params}, data={}, config={"model": vars(config)})
    assert_same(load(tmp_path / "run", weights="int8")[1], wanted)
    largest = max((tmp_path / "run").rglob("params/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=largest.name):
        load(tmp_path / "run", weights="int8")


def test_load_refuses_other_weights(tmp_path):
    with pytest.raises(ValueError, match="weights is 'int4'; it must be 'int8', or None"):
        mmx.load(tmp_path, weights="int4")


def test_load_never_holds_the_model_in_another_dtype(tmp_path):
    fields = checkpoints.released_fields(
        hidden_size=256, num_attention_heads=4, head_dim=64, num_local_experts=8,
        intermediate_size=512,
    )  # fmt: skip
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields))
    folder = checkpoints.write_folder(tmp_path / "it", fields, tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())
    stored = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    tracemalloc.start()  # numpy tells it of every array
    try:
        _, params = load(folder, weights="int8")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in flat(params).values())
    # A tensor read, in fp32 twice over and rounded, in int8; half a megabyte of everything else.
    assert peak <= result + 5 * largest + 5e5 < stored / 2
