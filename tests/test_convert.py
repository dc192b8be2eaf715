"""`mmx convert`: every form to every form, bit for bit, beside an independent reader."""

import hashlib
import json
import shutil

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conversions import (
    CASES,
    GOLDEN,
    TABLES,
    convert,
    digests,
    form_of,
    load,
    refused,
    small,
    without_tables,
)
from test_load import assert_same, flat

from mmx import integrity
from mmx.convert import plan as plan_module
from mmx.convert import source as source_module

# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("experts", ["separate", "fused"])
def test_there_and_back_is_the_same_to_the_bit(name, experts, tmp_path):
    wanted = checkpoints.read_folder(GOLDEN / name)
    orbax = convert(GOLDEN / name, tmp_path / "orbax", "--to", "orbax")
    options = ["--experts", experts] if form_of(name) == "hf" else []
    if form_of(name) == "hf" and experts == "fused":
        wanted = checkpoints.fuse(wanted) if not any("gate_up" in k for k in wanted) else wanted
    elif any("gate_up" in key for key in wanted):
        wanted = unfuse(wanted)
    back = convert(
        orbax, tmp_path / "back", "--to", form_of(name), *options, "--shard-size", "100KB"
    )
    seen = checkpoints.read_folder(back)
    if any(key.endswith(TABLES) for key in wanted):
        assert digests(seen) == digests(wanted)
    else:
        assert without_tables(digests(seen)) == digests(wanted)
    direct = convert(GOLDEN / name, tmp_path / "direct", "--to", form_of(name), *options)
    assert digests(checkpoints.read_folder(direct)) == digests(seen)
    original = load(GOLDEN / name)
    for folder in (orbax, back, direct):
        config, params = load(folder)
        assert config == original[0]
        assert_same(params, original[1])


@pytest.mark.parametrize("name", [checkpoints.RELEASED_BF16, "text/p08_fused_experts_top1",
                                  checkpoints.VISION])  # fmt: skip
@pytest.mark.parametrize("piece", [pytest.param(200, marks=pytest.mark.slow), 1500])
def test_tensors_in_many_pieces(name, piece, tmp_path, monkeypatch):
    """As at full size, where a matrix is read and stored in parts: rows, heads, and their ends."""
    monkeypatch.setattr(source_module, "PIECE", piece)
    monkeypatch.setattr(plan_module, "PIECE", piece)
    monkeypatch.setattr(plan_module, "WHOLE", 0)
    orbax = convert(GOLDEN / name, tmp_path / "orbax", "--to", "orbax")
    chunks = [len(e.chunks) for e in integrity.read_manifest(orbax).tensors.values()]
    assert max(chunks) > 3
    back = convert(orbax, tmp_path / "back", "--to", form_of(name))
    direct = convert(GOLDEN / name, tmp_path / "direct", "--to", form_of(name))
    wanted = checkpoints.read_folder(GOLDEN / name)
    if any("gate_up" in key for key in wanted):
        assert digests(checkpoints.read_folder(back)) == digests(unfuse(wanted))
    else:
        assert digests(checkpoints.read_folder(back)) == digests(wanted)
    assert digests(checkpoints.read_folder(direct)) == digests(wanted)
    restored = flat(ocp.StandardCheckpointer().restore(orbax / "params"))
    for path, leaf in flat(load(GOLDEN / name)[1]).items():
        np.testing.assert_array_equal(restored[path], leaf, err_msg=path)
    assert_same(load(orbax)[1], load(GOLDEN / name)[1])


def unfuse(tensors):
    """The opposite of `checkpoints.fuse`."""
    separate = {}
    for name, array in tensors.items():
        at = name.partition("mlp.")[0] + "block_sparse_moe."
        if name.endswith("mlp.gate.weight"):
            separate[at + "gate.weight"] = array
        elif name.endswith("gate_up_proj"):
            half = array.shape[1] // 2
            for expert, both in enumerate(array):
                separate[f"{at}experts.{expert}.w1.weight"] = both[:half]
                separate[f"{at}experts.{expert}.w3.weight"] = both[half:]
        elif name.endswith("mlp.experts.down_proj"):
            for expert, one in enumerate(array):
                separate[f"{at}experts.{expert}.w2.weight"] = one
        else:
            separate[name] = array
    return separate


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_random_checkpoints_of_the_released_form(dtype, shared, tied, tmp_path):
    source = small(
        tmp_path / "it", dtype=dtype, shared_intermediate_size=shared, tie_word_embeddings=tied
    )
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax")
    back = convert(orbax, tmp_path / "back", "--to", "hf-released")
    wanted = checkpoints.read_folder(source)
    assert digests(checkpoints.read_folder(back)) == digests(wanted)
    assert_same(load(orbax)[1], load(source)[1])


def test_m1_stays_m1(tmp_path):
    """Its keys and schema are those of Text-01 under another name."""
    source = small(tmp_path / "it", model_type="minimax_m1", architectures=["MiniMaxM1ForCausalLM"])
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax")
    back = convert(orbax, tmp_path / "back", "--to", "hf-released")
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert digests(checkpoints.read_folder(back)) == digests(checkpoints.read_folder(source))
    assert load(orbax)[0] == load(back)[0] == load(source)[0]
    assert_same(load(orbax)[1], load(source)[1])


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("to", ["orbax", "hf-released"])
def test_dtypes_but_never_of_routers(wanted, dtype, to, tmp_path):
    source = small(tmp_path / "it", dtype=dtype, torch_dtype="float16")
    out = convert(source, tmp_path / "out", "--to", to, "--dtype", wanted)
    kind = {"fp32": np.float32, "bf16": jnp.bfloat16}[wanted]
    expected = {
        key: value if wanted == "bf16" and "block_sparse_moe.gate." in key else value.astype(kind)
        for key, value in checkpoints.read_folder(source).items()
    }
    if to == "orbax":
        out = convert(out, tmp_path / "back", "--to", "hf-released")
    assert digests(checkpoints.read_folder(out)) == digests(expected)
    name = np.dtype(kind).name
    assert checkpoints.read_fields(out)["torch_dtype"] == name


def test_layers_of_different_dtypes_become_the_wider(tmp_path, capsys):
    source = small(tmp_path / "it", dtype=jnp.bfloat16)
    name = "model.layers.2.self_attn.qkv_proj.weight"
    for shard in sorted(source.glob("*.safetensors")):

        def widen(tensors):
            if name in tensors:
                tensors[name] = tensors[name].astype(np.float32)

        checkpoints.edit_tensors(source, shard.name, widen)
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax")
    note = "blocks/layer_0/attention/qkv_proj: stored as bfloat16 and float32, becomes float32"
    assert note in capsys.readouterr().err
    assert_same(load(orbax)[1], load(source)[1])


# ---------------------------------------------------------------- Orbax


def test_plain_orbax_reads_it_directly_onto_a_mesh(tmp_path):
    source = small(tmp_path / "it", num_local_experts=4, hidden_size=16, intermediate_size=8)
    options = ["--to", "orbax", "--mesh", "expert=4,fsdp=2"]
    folder = convert(source, tmp_path / "orbax", *options)
    wanted = flat(load(source)[1])
    plain = ocp.StandardCheckpointer().restore(folder / "params")
    assert flat(plain).keys() == wanted.keys()
    for path, leaf in flat(plain).items():
        np.testing.assert_array_equal(leaf, wanted[path])
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "expert", "fsdp"))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), load(source)[1]
    )
    experts = target["blocks"]["layer_0"]["moe"]["gate_proj"]
    target["blocks"]["layer_0"]["moe"]["gate_proj"] = jax.ShapeDtypeStruct(
        experts.shape, experts.dtype, sharding=sharding
    )
    onto = ocp.StandardCheckpointer().restore(folder / "params", target)
    assert onto["blocks"]["layer_0"]["moe"]["gate_proj"].sharding == sharding
    for path, leaf in flat(onto).items():
        np.testing.assert_array_equal(leaf, wanted[path])
    # Each device's part of the experts is chunks of its own: [1, 1 expert, half of the width, all].
    chunks = folder / "params" / "blocks.layer_0.moe.gate_proj"
    assert json.loads((chunks / ".zarray").read_text())["chunks"] == [1, 1, 8, 8]
    # Of other weights all axes of ZeRO-3 split the width.
    chunks = folder / "params" / "blocks.layer_0.attention.out_proj"
    assert json.loads((chunks / ".zarray").read_text())["chunks"][-1] == 16 // 8


def test_a_mesh_that_does_not_divide_is_refused(tmp_path, capsys):
    source = small(tmp_path / "it")
    line = refused(capsys, source, tmp_path / "out", "--to", "orbax", "--mesh", "expert=2")
    assert "moe/" in line
    assert "which 2 devices (expert=2) cannot share evenly" in line
    line = refused(capsys, source, tmp_path / "out", "--to", "orbax", "--mesh", "experts=3")
    assert "axes are" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["orbax", "hf-released"])
def test_a_flipped_bit_is_found_with_its_tensor(to, tmp_path):
    out = convert(small(tmp_path / "it"), tmp_path / "out", "--to", to)
    tensors = integrity.read_manifest(out).tensors
    name = next(name for name in tensors if "q_proj" in name)
    file, begin, end = tensors[name].chunks[0]
    content = bytearray((out / file).read_bytes())
    content[(begin + end) // 2] ^= 4
    (out / file).write_bytes(content)
    with pytest.raises(integrity.DamagedCheckpoint) as caught:
        integrity.verify(out)
    assert file in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("to", ["orbax", "hf-released"])
def test_digests_of_the_manifest_are_those_of_the_bytes(to, tmp_path):
    out = convert(small(tmp_path / "it"), tmp_path / "out", "--to", to)
    manifest = integrity.read_manifest(out)
    for name, entry in manifest.tensors.items():
        parts = [(out / file).read_bytes()[begin:end] for file, begin, end in entry.chunks]
        one = [hashlib.sha256(part).hexdigest() for part in parts]
        joined = hashlib.sha256("".join(one).encode()).hexdigest()
        assert entry.sha256 == (one[0] if len(one) == 1 else joined), name
    if to == "hf-released":
        seen = checkpoints.read_folder(out)
        assert {n: (e.shape, e.sha256) for n, e in manifest.tensors.items()} == {
            n: (a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for n, a in seen.items()
        }


def test_a_run_is_a_source(tmp_path):
    from mmx.training.checkpoint import Checkpoints

    config, params = load(GOLDEN / checkpoints.RELEASED)
    run = tmp_path / "run"
    with Checkpoints(run / "checkpoints") as saves:
        saves.save(3, {"params": params}, data={}, config={"model": vars(config)})
    orbax = convert(run, tmp_path / "orbax", "--to", "orbax")
    assert load(orbax)[0] == load(run)[0]
    assert_same(load(orbax)[1], load(run)[1])
    back = convert(run, tmp_path / "back", "--to", "hf-released")
    assert digests(checkpoints.read_folder(back)) == digests(
        checkpoints.read_folder(GOLDEN / checkpoints.RELEASED)
    )
    shutil.rmtree(run)
