"""`mmx.load` onto a mesh: the same parameters, each device's share read for it alone."""

import math

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from conversions import convert
from test_load import assert_same

import mmx
from mmx.convert import leaves
from mmx.convert.source import Source
from mmx.model import param_specs
from mmx.nn.quantized import Int8
from sharding import MeshConfig, Partition, make_mesh
from sharding.rules import EXPERT, SERVING

FIELDS = checkpoints.released_fields(
    hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_local_experts=4,
    intermediate_size=16, vocab_size=48,
)  # fmt: skip


def partition(rules, **axes):
    sizes = {"fsdp": 1, **axes}
    devices = jax.devices()[: math.prod(sizes.values())]
    return Partition(make_mesh(MeshConfig(**sizes), devices), rules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = checkpoints.random_tensors(checkpoints.shapes(FIELDS))
    return checkpoints.write_folder(tmp_path_factory.mktemp("hf") / "it", FIELDS, tensors)


@pytest.fixture(scope="module")
def orbax(folder, tmp_path_factory):
    return convert(folder, tmp_path_factory.mktemp("orbax") / "it", "--to", "orbax")


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize(
    "spread",
    [partition(SERVING, expert=2, tensor=2), partition(EXPERT, fsdp=2, expert=2, tensor=2)],
    ids=["serving", "training"],
)
def test_equals_what_one_device_holds(request, folder, form, spread, weights):
    where = folder if form == "hf" else request.getfixturevalue("orbax")
    options = dict(weights=weights, dtype=jnp.bfloat16)
    config, params = mmx.load(where, partition=spread, **options)
    assert_same(params, mmx.load(folder, **options)[1])

    def check(spec, leaf):
        values = leaf.values if isinstance(leaf, Int8) else leaf
        wanted = spread.sharding(spec.axes, spec.shape)
        assert values.sharding.is_equivalent_to(wanted, values.ndim)
        if isinstance(leaf, Int8):  # a scale lies where its channels lie
            for value, scale in zip(
                values.addressable_shards, leaf.scale.addressable_shards, strict=True
            ):
                for axis, (n, m) in enumerate(zip(value.data.shape, scale.data.shape, strict=True)):
                    assert m == (1 if axis in spec.inputs else n)

    jax.tree.map(check, param_specs(config), params)


def test_only_a_share_is_read_and_held(folder, monkeypatch):
    """Experts over 4 devices: each tensor is read once, and the host has a quarter of a leaf."""
    read = []
    original = Source.read

    def counted(self, entry, box=()):
        part = original(self, entry, box)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(Source, "read", counted)
    _, whole = mmx.load(folder)
    once = sum(read)
    read.clear()
    held = []

    def aligned(shape, dtype, original=leaves._aligned):
        held.append(math.prod(shape) * dtype.itemsize)
        return original(shape, dtype)

    monkeypatch.setattr(leaves, "_aligned", aligned)
    _, params = mmx.load(folder, partition=partition(SERVING, expert=4))
    assert sum(read) == once  # no byte twice, no byte too many
    assert max(held) == max(leaf.nbytes for leaf in jax.tree.leaves(whole)) // 4
    assert_same(params, whole)


def test_sizes_that_do_not_divide_are_named(folder):
    with pytest.raises(ValueError, match="embed/embedding: 'vocab' has size 48"):
        mmx.load(folder, partition=partition(SERVING, tensor=5))
