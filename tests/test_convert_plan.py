"""The plan of a conversion: complete, from headers alone, at full size."""

import json
import os
import shutil
import subprocess
import sys

import checkpoints
import jax.numpy as jnp
import pytest
from conversions import convert, digests, load, small
from test_load import assert_same

from mmx.cli import main


def released_folder(folder, fields, dtype_of):
    """Headers of a checkpoint whose data is a hole in the file: as many shards as published."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    wanted = list(checkpoints.shapes(fields).items())
    each = -(-len(wanted) // 413)
    weight_map, total = {}, 0
    groups = [wanted[i : i + each] for i in range(0, len(wanted), each)]
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in group:
            dtype, size = dtype_of(name)
            end = offset + size * checkpoints.size(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[name], offset = shard, end
        begin = checkpoints.join_file(header, b"")
        (folder / shard).write_bytes(begin)
        os.truncate(folder / shard, len(begin) + offset)
        total += offset
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def as_released(name):
    return ("F32", 4) if ".block_sparse_moe.gate." in name else ("BF16", 2)


FULL = dict(
    vocab_size=200064, hidden_size=6144, num_hidden_layers=80,
    attn_type_list=[int(i % 8 == 7) for i in range(80)], num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, rotary_dim=64, num_local_experts=32,
    intermediate_size=9216,
)  # fmt: skip

MEASURE = """
import json, re, sys, time
from mmx.cli import main
code = main(sys.argv[1:])
# Of this process, from its beginning: others may run beside it, and reading headers waits for none.
seconds = time.process_time()
# VmHWM and not ru_maxrss, which begins with the peak of the process that started this one.
peak = int(re.search(r"VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([code, seconds, peak]))
"""


def measured(*arguments):
    """The command in a process of its own: what it printed, seconds, peak bytes of memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    code, seconds, peak = json.loads(last)
    assert code == 0, done.stderr
    return lines, seconds, peak


@pytest.mark.parametrize("to", ["orbax", pytest.param("hf-released", marks=pytest.mark.slow)])
def test_the_plan_of_the_full_size_from_headers_alone(to, tmp_path):
    fields = checkpoints.released_fields(**FULL)
    total = released_folder(tmp_path / "it", fields, as_released)
    assert total == 912_210_767_872  # as the published index says
    options = ["--to", to, "--dry-run"]
    lines, seconds, peak = measured("convert", tmp_path / "it", tmp_path / "out", *options)
    assert "source: 8,243 keys, 912,210,767,872 bytes (hf-released)" in lines
    assert any(line.startswith("output: 912,210,767,872 bytes") for line in lines)
    plan = dict(line.split(" -> ", 1) for line in lines if " -> " in line)
    assert plan.keys() == checkpoints.shapes(fields).keys()
    assert seconds < 20
    assert peak < 500e6
    assert not (tmp_path / "out").exists()
    key = "model.layers.15.block_sparse_moe.experts.3.w2.weight"
    target = f"{key}  6144x9216 bfloat16  copy  113,246,208 B"
    if to == "orbax":
        place = "params/blocks/layer_7/moe/down_proj[1, 3]"
        target = f"{place}  6144x9216 bfloat16  transpose  113,246,208 B"
    assert plan[key] == target


def test_all_released_keys_at_reduced_width(tmp_path):
    fields = checkpoints.released_fields(**FULL) | checkpoints.released_fields(
        num_hidden_layers=80, attn_type_list=FULL["attn_type_list"], num_local_experts=32
    )
    tensors = {
        name: array if as_released(name)[0] == "F32" else array.astype(jnp.bfloat16)
        for name, array in checkpoints.random_tensors(checkpoints.shapes(fields)).items()
    }
    assert len(tensors) == 8243
    shards = [f"model-{i:05d}-of-00007.safetensors" for i in range(7)]
    source = checkpoints.write_folder(tmp_path / "it", fields, tensors, shards)
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax", verify="sample")
    back = convert(orbax, tmp_path / "back", "--to", "hf-released", "--shard-size", "1MB")
    assert digests(checkpoints.read_folder(back)) == digests(tensors)
    assert_same(load(orbax)[1], load(source)[1])


def test_a_dry_run_writes_nothing_and_names_everything(tmp_path, capsys):
    source = small(tmp_path / "it", "fused")
    before = sorted(os.walk(tmp_path))
    for to in ("orbax", "hf", "hf-released"):
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", to, "--dry-run"]) == 0
        out = capsys.readouterr().out
        for key in checkpoints.read_folder(source):
            assert f"{key} -> " in out
        total = sum(array.nbytes for array in checkpoints.read_folder(source).values())
        assert f"{total:,} bytes (hf-released)" in out
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("to", ["orbax", "hf-released"])
def test_memory_stays_below_what_was_asked(to, tmp_path):
    """1.1 GB, an embedding of 268 MB among it, within 640 MiB, of which half is the program."""
    fields = checkpoints.released_fields(
        vocab_size=1 << 16, hidden_size=2048, num_attention_heads=16, head_dim=128,
        num_local_experts=8, intermediate_size=2048, num_hidden_layers=2, attn_type_list=[0, 1],
    )  # fmt: skip
    total = released_folder(tmp_path / "it", fields, as_released)
    assert total > 1e9
    options = ["--to", to, "--max-ram", "640MiB", "--verify", "sample", "--workers", "4"]
    try:
        _, _, peak = measured("convert", tmp_path / "it", tmp_path / "out", *options)
    finally:
        for folder in tmp_path.glob("out*"):
            shutil.rmtree(folder)  # pytest keeps temporary folders for a while
    assert peak < 640 * 2**20
