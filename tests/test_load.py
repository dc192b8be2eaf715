"""`mmx.load`: the right tensor in the right place, whatever the packaging."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx.config import decay_slopes

GOLDEN = checkpoints.GOLDEN
ROUTERS = "moe/router/kernel"


def load(folder, **options):
    """mmx.load, for which any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return mmx.load(folder, **options)


def flat(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def assert_same(left, right):
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def small(**changes):
    """Fields and random tensors of a small released checkpoint."""
    fields = checkpoints.released_fields(**changes)
    return fields, checkpoints.random_tensors(checkpoints.shapes(fields))


# ---------------------------------------------------------------- values


def expected_layer(tensors, fields, layer, lightning):
    """Parameters of one layer by explicit indexing of its tensors: [out, in] -> in, then out."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim, width, hidden = fields["head_dim"], fields["hidden_size"], fields["intermediate_size"]
    at = f"model.layers.{layer}."
    one = {
        "attention_norm/scale": tensors[at + "input_layernorm.weight"],
        "mlp_norm/scale": tensors[at + "post_attention_layernorm.weight"],
    }
    attention = at + "self_attn."
    if lightning:
        qkv = tensors[attention + "qkv_proj.weight"].reshape(heads, 3, dim, width)
        gate = tensors[attention + "output_gate.weight"].reshape(heads, dim, width)
        out = tensors[attention + "out_proj.weight"].reshape(width, heads, dim)
        one["attention/qkv_proj"] = np.einsum("hckd->dhck", qkv)
        one["attention/gate_proj"] = np.einsum("hkd->dhk", gate)
        one["attention/norm/scale"] = tensors[attention + "norm.weight"]
    else:
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            matrix = tensors[f"{attention}{name}.weight"].reshape(count, dim, width)
            one[f"attention/{name}"] = np.einsum("hkd->dhk", matrix)
        out = tensors[attention + "o_proj.weight"].reshape(width, heads, dim)
    one["attention/out_proj"] = np.einsum("dhk->hkd", out)
    if at + "mlp.gate.weight" in tensors:
        one[ROUTERS] = tensors[at + "mlp.gate.weight"].T
        gate_up = tensors[at + "mlp.experts.gate_up_proj"]
        one["moe/gate_proj"] = np.einsum("efd->edf", gate_up[:, :hidden])
        one["moe/up_proj"] = np.einsum("efd->edf", gate_up[:, hidden:])
        one["moe/down_proj"] = np.einsum("edf->efd", tensors[at + "mlp.experts.down_proj"])
        return one
    one[ROUTERS] = tensors[at + "block_sparse_moe.gate.weight"].T
    for name, w in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        one[f"moe/{name}"] = np.stack(
            [
                tensors[f"{at}block_sparse_moe.experts.{expert}.{w}.weight"].T
                for expert in range(fields["num_local_experts"])
            ]
        )
    return one


def expected_params(tensors, fields):
    """All parameters: layers stacked over repetitions of the shortest period."""
    kinds = fields.get("attn_type_list") or [
        int(kind == "full_attention") for kind in fields["layer_types"]
    ]
    count = len(kinds)
    period = min(
        n
        for n in range(1, count + 1)
        if count % n == 0 and all(kinds[i] == kinds[i % n] for i in range(count))
    )
    wanted = {
        "embed/embedding": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
    }
    if not fields["tie_word_embeddings"]:
        wanted["head/kernel"] = tensors["lm_head.weight"].T
    layers = [expected_layer(tensors, fields, i, kinds[i] == 0) for i in range(count)]
    for place in range(period):
        for name in layers[place]:
            stack = np.stack([layer[name] for layer in layers[place::period]])
            wanted[f"blocks/layer_{place}/{name}"] = stack
    return wanted


@pytest.mark.parametrize("name", checkpoints.GOLDEN_NAMES)
def test_every_golden_parameter(name):
    """Each value of each tensor, bit for bit, in the parameter and place it belongs to."""
    config, params = load(GOLDEN / name)
    fields = checkpoints.read_fields(GOLDEN / name)
    wanted = expected_params(checkpoints.read_folder(GOLDEN / name), fields)
    seen = flat(params)
    assert seen.keys() == wanted.keys()
    for path, leaf in seen.items():
        stored = np.float32 if path.endswith(ROUTERS) else wanted[path].dtype
        assert leaf.dtype == stored, path
        np.testing.assert_array_equal(leaf, wanted[path].astype(stored), err_msg=path)
    # ... and in the shapes that the model declares.
    abstract = flat_shapes(mmx.abstract_params(config))
    assert {path: leaf.shape for path, leaf in seen.items()} == abstract


def flat_shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_slopes_are_those_that_transformers_stored():
    compared = 0
    for name in checkpoints.GOLDEN_NAMES:
        tensors = checkpoints.read_folder(GOLDEN / name)
        config = mmx.ModelConfig.from_hf(checkpoints.read_fields(GOLDEN / name))
        slopes = decay_slopes(config)
        for layer in range(config.num_layers):
            stored = tensors.get(f"model.layers.{layer}.self_attn.slope_rate")
            if stored is not None:
                # fp32 there, float64 here until the end: near the last layer the factor is a
                # difference of numbers near 1, so the error is absolute, one fp32 rounding of 1.
                np.testing.assert_allclose(slopes[layer], stored.ravel(), rtol=1e-6, atol=1e-7)
                compared += 1
    assert compared > 10


# ---------------------------------------------------------------- packaging


def test_separate_and_fused_experts_are_the_same_model(tmp_path):
    fields, tensors = small()
    separate = checkpoints.write_folder(tmp_path / "separate", fields, tensors)
    fused = checkpoints.write_folder(tmp_path / "fused", fields, checkpoints.fuse(tensors))
    assert_same(load(separate)[1], load(fused)[1])


@pytest.mark.parametrize("name", [checkpoints.RELEASED, checkpoints.TRANSFORMERS])
def test_a_fused_copy_of_a_golden_checkpoint(name, tmp_path):
    fields = checkpoints.read_fields(GOLDEN / name)
    fused = checkpoints.fuse(checkpoints.read_folder(GOLDEN / name))
    folder = checkpoints.write_folder(tmp_path / "fused", fields, fused)
    assert_same(load(folder)[1], load(GOLDEN / name)[1])


def test_decay_tables_may_be_there_or_not(tmp_path):
    name = checkpoints.TRANSFORMERS
    fields, tensors = (
        checkpoints.read_fields(GOLDEN / name),
        checkpoints.read_folder(GOLDEN / name),
    )
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    bare = {key: value for key, value in tensors.items() if not key.endswith(tables)}
    assert len(bare) == len(tensors) - 8  # four tables of two lightning layers
    folder = checkpoints.write_folder(tmp_path / "bare", fields, bare)
    assert_same(load(folder)[1], load(GOLDEN / name)[1])


@pytest.mark.parametrize(
    "shards",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        [f"model-{i:05d}-of-00007.safetensors" for i in range(7)],  # from 0, as some are
        ["b.safetensors", "a.safetensors", "model.safetensors"],
        ["model.safetensors"],
    ],
    ids=["two", "seven from zero", "any names", "one with an index"],
)
def test_shards(shards, tmp_path):
    """Tensors are dealt out in turn, so layers, experts and fused pairs straddle the shards."""
    fields, tensors = small()
    single = checkpoints.write_folder(tmp_path / "single", fields, tensors)
    sharded = checkpoints.write_folder(tmp_path / "sharded", fields, tensors, shards)
    assert_same(load(single)[1], load(sharded)[1])


def test_files_that_no_one_asked_for_are_left_alone(tmp_path):
    fields, tensors = small()
    folder = checkpoints.write_folder(tmp_path / "it", fields, tensors)
    before = load(folder)[1]
    (folder / "consolidated.safetensors").write_bytes(b"not safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    (folder / "tokenizer.json").write_text("not json")
    assert_same(load(folder)[1], before)


def test_path_may_be_a_string_relative_or_a_link(tmp_path, monkeypatch):
    fields, tensors = small()
    folder = checkpoints.write_folder(tmp_path / "it", fields, tensors)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    wanted = load(folder)
    for path in (str(folder), "it", Path("it"), "it/", tmp_path / "link", "link"):
        config, params = load(path)
        assert config == wanted[0]
        assert_same(params, wanted[1])


def test_hugging_face_cache(tmp_path):
    """snapshots/<revision>/<name> are links to ../../blobs/<hash>."""
    fields, tensors = small()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    plain = checkpoints.write_folder(tmp_path / "plain", fields, tensors, shards)
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, home / "blobs" / f"hash{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash{i}")
    assert_same(load(snapshot)[1], load(plain)[1])


@pytest.mark.parametrize("vision", [True, False])
def test_vl_holds_the_text_model_under_a_prefix(vision, tmp_path):
    fields, tensors = small()
    wanted = load(checkpoints.write_folder(tmp_path / "text", fields, tensors))
    prefixed = {f"language_model.{key}": value for key, value in tensors.items()}
    if vision:
        for key in ("vision_tower.vision_model.embeddings.class_embedding", "image_newline",
                    "multi_modal_projector.linear_1.weight"):  # fmt: skip
            prefixed[key] = np.ones(3, np.float32)
    vl = {"model_type": "minimax_vl_01", "text_config": fields, "vision_config": {}}
    folder = checkpoints.write_folder(tmp_path / "vl", vl, prefixed)
    if vision:
        with pytest.warns(UserWarning, match="3 tensors of the vision model are not loaded"):
            config, params = mmx.load(folder)
    else:
        config, params = load(folder)
    assert config == wanted[0]
    assert_same(params, wanted[1])


def test_tied_head(tmp_path):
    fields, tensors = small(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    absent = load(checkpoints.write_folder(tmp_path / "absent", fields, tensors))[1]
    assert "head" not in absent
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert_same(load(checkpoints.write_folder(tmp_path / "same", fields, tensors))[1], absent)
    tensors["lm_head.weight"][3, 4] += 1
    different = checkpoints.write_folder(tmp_path / "different", fields, tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        mmx.load(different)


def test_shared_expert(tmp_path):
    fields, tensors = small(shared_intermediate_size=5)
    seen = flat(load(checkpoints.write_folder(tmp_path / "it", fields, tensors))[1])
    for layer in range(4):
        at, path = f"model.layers.{layer}.", f"blocks/layer_{layer % 2}/moe/"
        for name in ("gate_proj", "up_proj", "down_proj"):
            wanted = tensors[f"{at}shared_mlp.{name}.weight"].T
            np.testing.assert_array_equal(seen[f"{path}shared_expert/{name}"][layer // 2], wanted)
        wanted = tensors[at + "coefficient.weight"].T
        np.testing.assert_array_equal(seen[path + "shared_coefficient"][layer // 2], wanted)


# ---------------------------------------------------------------- dtypes


def dtypes(params):
    routers = {leaf.dtype for path, leaf in flat(params).items() if path.endswith(ROUTERS)}
    others = {leaf.dtype for path, leaf in flat(params).items() if not path.endswith(ROUTERS)}
    return routers, others


@pytest.mark.parametrize("stored", [jnp.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wanted", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(stored, wanted, tmp_path):
    fields, _ = small()
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields), stored)
    params = load(checkpoints.write_folder(tmp_path / "it", fields, tensors), dtype=wanted)[1]
    # jax holds no float64 unless told to; fp16 is widened, these models leave its range.
    kept = np.float32 if stored in (np.float16, np.float64) else stored
    result = np.dtype(wanted or kept)
    assert dtypes(params) == ({np.dtype(np.float32)}, {result})
    wanted_values = expected_params(tensors, fields)
    for path, leaf in flat(params).items():
        # Every cast is to the nearest, so once, directly, is the only right answer.
        np.testing.assert_array_equal(leaf, wanted_values[path].astype(leaf.dtype), err_msg=path)


def test_routers_in_fp32_beside_bf16_as_released(tmp_path):
    fields, tensors = small()
    mixed = {
        key: value if ".block_sparse_moe.gate." in key else value.astype(jnp.bfloat16)
        for key, value in tensors.items()
    }
    params = load(checkpoints.write_folder(tmp_path / "it", fields, mixed))[1]
    assert dtypes(params) == ({np.dtype(np.float32)}, {np.dtype(jnp.bfloat16)})
    router = tensors["model.layers.2.block_sparse_moe.gate.weight"].T
    np.testing.assert_array_equal(flat(params)[f"blocks/layer_0/{ROUTERS}"][1], router)


@pytest.mark.parametrize("other", [np.float32, np.float16, np.float64])
def test_layers_of_different_dtypes_take_the_wider(other, tmp_path):
    """Layers 0 and 2 are one parameter; bf16 and fp16 both fit in fp32 and not in each other."""
    fields, tensors = small()
    name = "model.layers.{}.self_attn.qkv_proj.weight"
    tensors[name.format(0)] = tensors[name.format(0)].astype(jnp.bfloat16)
    tensors[name.format(2)] = tensors[name.format(2)].astype(other)
    params = load(checkpoints.write_folder(tmp_path / "it", fields, tensors))[1]
    leaf = flat(params)["blocks/layer_0/attention/qkv_proj"]
    assert leaf.dtype == np.float32
    single = {key: value.astype(np.float32) for key, value in tensors.items()}
    wanted = expected_params(single, fields)["blocks/layer_0/attention/qkv_proj"]
    np.testing.assert_array_equal(leaf, wanted)


@pytest.mark.parametrize("dtype", ["int32", "float16", "complex64", bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; it must be float32 or bfloat16"):
        mmx.load(GOLDEN / checkpoints.RELEASED, dtype=dtype)


# ---------------------------------------------------------------- memory

# VmHWM and not ru_maxrss, which begins with the peak of the process that started this one.
MEASURE = """
import json, sys
import jax, mmx

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

jax.devices()
mmx.load(sys.argv[1])  # everything is imported and set up now
before = kilobytes("VmRSS")
_, params = mmx.load(sys.argv[2])
jax.block_until_ready(params)
growth = 1024 * (kilobytes("VmHWM") - before)
result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"growth": growth, "result": result}))
"""


def test_memory_holds_one_tensor_beyond_the_result(tmp_path):
    fields, _ = small(vocab_size=8192, hidden_size=512, num_attention_heads=8, head_dim=64,
                      num_local_experts=8, intermediate_size=1024)  # fmt: skip
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields))
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    folder = checkpoints.write_folder(tmp_path / "large", fields, tensors, shards)
    largest = max(tensor.nbytes for tensor in tensors.values())
    stored = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, GOLDEN / checkpoints.RELEASED, folder],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        shutil.rmtree(folder)  # pytest keeps temporary folders for a while
    seen = json.loads(done.stdout)
    assert seen["result"] == stored > 200e6
    # 60 MB for the allocator, the file's pages in flight and noise: far below a second copy.
    assert seen["growth"] <= seen["result"] + largest + 60e6
