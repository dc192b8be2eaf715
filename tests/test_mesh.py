"""Meshes, logical axis rules and partitions: what they give, and every refusal in its words."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import mmx
from mmx.model import param_specs
from mmx.training.placement import rows_of_process
from sharding import rules
from sharding.mesh import AXES, MeshConfig, axis_sizes, make_mesh
from sharding.partition import Partition, constrain, named


def refused(text):
    return pytest.raises(ValueError, match=re.escape(text))


def abstract(**sizes):
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("asked", "devices", "slices", "wanted"),
    [
        (dict(), 1, 1, (1, 1, 1, 1, 1)),
        (dict(), 8, 1, (1, 8, 1, 1, 1)),
        (dict(fsdp=2, expert=-1), 8, 1, (1, 2, 4, 1, 1)),
        (dict(data=2, fsdp=-1, expert=32, tensor=2), 2048, 1, (2, 16, 32, 1, 2)),
        (dict(data=4, fsdp=-1), 8, 4, (4, 2, 1, 1, 1)),
        (dict(data=4, fsdp=-1), 8, 2, (4, 2, 1, 1, 1)),
        (dict(data=2, fsdp=4), 8, 4, (2, 4, 1, 1, 1)),
        (dict(fsdp=4, seq=2), 8, 2, (1, 4, 1, 2, 1)),
    ],
)
def test_sizes(asked, devices, slices, wanted):
    assert axis_sizes(MeshConfig(**asked), devices, slices=slices) == dict(
        zip(AXES, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("asked", "devices", "slices", "text"),
    [
        (
            dict(data=2, fsdp=3),
            8,
            1,
            "mesh data=2 x fsdp=3 x expert=1 x seq=1 x tensor=1 takes 6 devices and there are 8; "
            "the nearest that fits is data=2, fsdp=4, expert=1, seq=1, tensor=1",
        ),
        (
            dict(expert=3),
            8,
            1,
            "mesh data=1 x fsdp=-1 x expert=3 x seq=1 x tensor=1 takes a multiple of 3 devices and "
            "there are 8; the nearest that fits is data=1, fsdp=2, expert=4, seq=1, tensor=1",
        ),
        (
            dict(fsdp=16, expert=32, tensor=2),
            512,
            1,
            "takes 1024 devices and there are 512; the nearest that fits is "
            "data=1, fsdp=8, expert=32, seq=1, tensor=2",
        ),
        (
            dict(fsdp=1, expert=8),
            8,
            2,
            "mesh data=1 x fsdp=1 x expert=8 x seq=1 x tensor=1 cannot be laid over 2 slices: the "
            "slices must divide data, or data them and what is left fsdp; the nearest that fits is "
            "data=1, fsdp=2, expert=4, seq=1, tensor=1",
        ),
    ],
)
def test_sizes_that_are_refused(asked, devices, slices, text):
    with refused(text):
        axis_sizes(MeshConfig(**asked), devices, slices=slices)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (dict(seq=0), "mesh axis seq is 0; it must be a number of devices, or -1 for all that"),
        (dict(data=-2), "mesh axis data is -2; it must be"),
        (dict(tensor=2.0), "mesh axis tensor is 2.0; it must be"),
        (dict(data=True), "mesh axis data is True; it must be"),
        (dict(data=-1), "mesh axes data and fsdp are both -1; only one can take what is left"),
    ],
)
def test_configs_that_are_refused(asked, text):
    with refused(text):
        MeshConfig(**asked)


def test_a_mesh_has_all_axes_and_slices_are_outermost():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "seq", "tensor")
    ids = np.vectorize(lambda device: device.id)
    np.testing.assert_array_equal(ids(mesh.devices).reshape(-1), np.arange(8))
    # Slices of two devices each, over data and then fsdp; tensor stays within one.
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), slices=4)
    assert ids(mesh.devices).reshape(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    half = make_mesh(MeshConfig(), jax.devices()[:4])
    assert dict(half.shape) == {"data": 1, "fsdp": 4, "expert": 1, "seq": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip as far as a mesh looks at it: eight in a row, four in each of two slices."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def slice_index(self) -> int:  # interleaved
        return self.id % 2

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.id // 2, 0, 0)


def test_slices_are_those_the_devices_name():
    chips = [Chip(id) for id in range(8)]
    mesh = make_mesh(MeshConfig(data=2), chips)
    found = [[chip.slice_index for chip in row.reshape(-1)] for row in mesh.devices]
    assert found == [[0] * 4, [1] * 4]
    with refused("cannot be laid over 2 slices"):
        make_mesh(MeshConfig(fsdp=1, tensor=8), chips)
    with refused("slices is 4, but the devices belong to 2; leave it None"):
        make_mesh(MeshConfig(data=4), chips, slices=4)
    with refused("the slices have 4, 2 devices; pass as many of each"):
        make_mesh(MeshConfig(), [*chips[:4], chips[4], chips[6]])
    with refused("8 devices cannot be cut into 3 equal slices; choose a divisor of 8"):
        make_mesh(MeshConfig(), slices=3)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("ours", "axes", "shape", "wanted"),
    [
        (rules.FSDP, ("layers", "embed", "heads", "head_dim"), (2, 8, 4, 4), (None, "fsdp")),
        (rules.FSDP, ("batch", "seq", "embed"), (4, 8, 8), ("fsdp",)),
        (rules.TENSOR, ("embed", "heads", None, "head_dim"), (8, 4, 3, 4), ("fsdp", "tensor")),
        (rules.TENSOR, ("batch", "seq", "vocab"), (4, 8, 8), ("fsdp", None, "tensor")),
        # The same name, three meanings.
        (rules.EXPERT, ("embed", None), (8, 3), (("fsdp", "expert"),)),
        (
            rules.EXPERT,
            ("experts", "embed", "expert_mlp"),
            (8, 8, 8),
            ("expert", "fsdp", "tensor"),
        ),
        (rules.EXPERT, ("batch", "seq", "embed"), (8, 8, 8), (("fsdp", "expert"),)),
        (rules.LONG_CONTEXT, ("batch", "seq", "embed"), (8, 8, 8), ("fsdp", "expert")),
        (rules.SERVING, ("embed", "heads", "head_dim"), (8, 4, 4), (None, ("expert", "tensor"))),
        (rules.SERVING, ("experts", "embed", "expert_mlp"), (8, 8, 8), ("expert", None, "tensor")),
        (rules.SERVING, ("embed",), (7,), ()),
    ],
)
def test_specs(ours, axes, shape, wanted):
    mesh = abstract(fsdp=2, expert=2, tensor=2)
    assert rules.spec(ours, axes, shape, mesh) == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    ("ours", "axes", "shape", "text"),
    [
        (rules.FSDP, ("embed",), (8, 8), "w: 1 logical axes ('embed',) for shape (8, 8)"),
        (
            rules.FSDP,
            ("embed", "widht"),
            (8, 8),
            "w with axes ('embed', 'widht'): unknown logical axis 'widht'; choose None or one of "
            "batch, seq, embed, expert_embed, activation_embed, heads, kv_heads, head_dim, mlp, "
            "experts, expert_mlp, vocab, layers",
        ),
        (
            dataclasses.replace(rules.FSDP, mlp=("model",)),
            ("embed", "mlp"),
            (8, 8),
            "rules 'fsdp' split 'mlp' over 'model', which is no axis of the mesh; it has data, "
            "fsdp, expert, seq, tensor",
        ),
        (
            rules.TENSOR,
            ("heads", "mlp"),
            (8, 8),
            "w with axes ('heads', 'mlp'): 'heads' and 'mlp' are both split over mesh axis 'tensor'"
            " by rules 'tensor'; give one of them another mesh axis, or ()",
        ),
        (
            rules.EXPERT,
            ("embed", "embed"),
            (8, 8),
            "'embed' and 'embed' are both split over mesh axis 'fsdp'",
        ),
        (
            rules.TENSOR,
            ("kv_heads",),
            (6,),
            "w: 'kv_heads' has size 6, which 4 devices (tensor=4) cannot share evenly; the nearest "
            "numbers that can are 3 or 6",
        ),
        (
            rules.SERVING,
            ("kv_heads",),
            (8,),
            "w: 'kv_heads' has size 8, which 16 devices (expert=4 x tensor=4) cannot share evenly; "
            "the nearest numbers that can are 8",
        ),
    ],
)
def test_specs_that_are_refused(ours, axes, shape, text):
    with refused(text):
        rules.spec(ours, axes, shape, abstract(fsdp=2, expert=4, tensor=4), name="w")


def text_01():
    """(name, shape, axes, bytes of a number) of every parameter, bf16 but for the router."""
    specs = jax.tree_util.tree_leaves_with_path(param_specs(mmx.preset("minimax-text-01")))
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            spec.shape,
            spec.axes,
            4 if spec.fp32 else 2,
        )
        for path, spec in specs
    ]


def test_vocabulary_over_256_devices_is_padded_when_asked():
    """200,064 is 128 * 1563."""
    mesh = abstract(tensor=256)
    only = [entry for entry in text_01() if entry[0] == "embed/embedding"]
    with refused(
        "embed/embedding: 'vocab' has size 200064, which 256 devices (tensor=256) cannot share "
        "evenly; the nearest numbers that can are 192 or 384; or pad it to 200192 words "
        "(padded_size)"
    ):
        rules.table(only, mesh, rules.TENSOR)
    (row,) = rules.table(only, mesh, rules.TENSOR, padded=("vocab",))
    assert row.shape == (200_192, 6144)
    assert row.bytes_per_device == 200_192 * 6144 * 2 // 256
    padded = rules.padded_size(
        200_064, "vocab", ("vocab", "embed"), rules=rules.TENSOR, mesh=abstract(tensor=128)
    )
    assert padded == 200_064


@pytest.mark.parametrize(
    ("ours", "sizes"),
    [
        (rules.FSDP, dict(data=1, fsdp=512)),
        (rules.EXPERT, dict(fsdp=16, expert=32)),
        (rules.LONG_CONTEXT, dict(fsdp=8, expert=32, seq=2)),
    ],
)
def test_text_01_is_spread_over_all_of_512_devices(ours, sizes):
    specs = text_01()
    total = sum(math.prod(shape) * itemsize for _, shape, _, itemsize in specs)
    assert total == pytest.approx(2 * 456.09e9, rel=1e-4)  # 456 billion parameters
    rows = {row.name: row for row in rules.table(specs, abstract(**sizes), ours)}
    # Norms over all heads are not split by ZeRO-3: 16 KiB a layer, named here.
    norms = {f"blocks/layer_{i}/attention/norm/scale" for i in range(7)}
    whole = {name for name, row in rows.items() if row.spec == PartitionSpec()}
    assert whole == norms
    held = sum(rows[name].bytes_per_device for name in rows if name not in norms)
    kept = 70 * 8192 * 2
    assert held * 512 + kept == total
    assert sum(rows[name].bytes_per_device for name in norms) == kept


def test_experts_have_data_parallelism_of_their_own():
    """Text-01 on 512 devices, by hand: experts over 32 and 16, all else over their product."""
    rows = {r.name: r for r in rules.table(text_01(), abstract(fsdp=16, expert=32), rules.EXPERT)}
    experts = rows["blocks/layer_3/moe/down_proj"]
    assert experts.spec == PartitionSpec(None, "expert", None, "fsdp")
    assert experts.bytes_per_device == 10 * 1 * 9216 * (6144 // 16) * 2
    dense = rows["blocks/layer_7/attention/q_proj"]
    assert dense.spec == PartitionSpec(None, ("fsdp", "expert"))
    assert dense.bytes_per_device == 10 * 12 * 64 * 128 * 2
    over_more = rules.table(text_01(), abstract(data=4, fsdp=16, expert=32), rules.EXPERT)
    assert [row.spec for row in over_more] == [row.spec for row in rows.values()]


# ---------------------------------------------------------------- partitions


def test_a_partition_is_a_static_argument():
    """Equal partitions share a program; arrays come out as the rules say."""
    traced = []

    def double(x, partition):
        traced.append(partition)
        return constrain(x * 2, "batch", "seq", "embed", partition=partition)

    run = jax.jit(double, static_argnums=1)
    x = jnp.arange(8 * 2 * 4.0).reshape(8, 2, 4)
    for _ in range(2):
        partition = Partition(make_mesh(MeshConfig(fsdp=4, expert=2)), rules.EXPERT)
        out = run(x, partition)
        assert out.sharding.is_equivalent_to(partition.sharding(("batch",), (8,)), 3)
        np.testing.assert_array_equal(out, x * 2)
    assert len(traced) == 1
    assert constrain(x, "batch", "seq", "embed", partition=None) is x
    with refused("array: 'batch' has size 6, which 8 devices (fsdp=4 x expert=2) cannot share"):
        run(x[:6], partition)


def test_shardings_of_a_tree_by_path():
    partition = Partition(make_mesh(MeshConfig(fsdp=2, expert=4)), rules.EXPERT)
    config = mmx.ModelConfig(**{**dataclasses.asdict(mmx.preset("tiny")), "num_experts": 4})
    specs = param_specs(config)
    found = named(
        mmx.abstract_params(config), jax.tree.map(lambda spec: spec.axes, specs), partition
    )
    moe = found["blocks"]["layer_0"]["moe"]
    assert moe["gate_proj"].spec == PartitionSpec(None, "expert", "fsdp")
    assert moe["router"]["kernel"].spec == PartitionSpec(None, ("fsdp", "expert"))
    assert jax.tree.structure(found) == jax.tree.structure(specs)
    with refused("a/b: 'embed' has size 6, which 8 devices"):
        named({"a": {"b": jnp.zeros(6)}}, {"a": {"b": ("embed",)}}, partition)


def test_partitions_that_are_refused():
    with refused(
        "rules 'fsdp' split nothing over mesh axis 'expert', whose 8 devices would all do the same;"
        " make it 1 or choose other rules"
    ):
        Partition(make_mesh(MeshConfig(expert=8)), rules.FSDP)
    with refused("rules 'fsdp' use mesh axis 'data'; the mesh has rows"):
        Partition(AbstractMesh((8,), ("rows",)), rules.FSDP)


@pytest.mark.parametrize(
    ("sizes", "ours", "wanted"),
    [
        (dict(fsdp=8), rules.FSDP, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (dict(fsdp=2, tensor=4), rules.TENSOR, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (dict(fsdp=2, expert=2, seq=2), rules.EXPERT, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (dict(fsdp=1, seq=8), rules.LONG_CONTEXT, [(0, 1)] * 4),
    ],
)
def test_rows_that_each_of_four_processes_loads(sizes, ours, wanted):
    """Two devices a process, in order; rows of the same tokens are loaded by all who need them."""
    partition = Partition(make_mesh(MeshConfig(**sizes)), ours)
    owned = [dataclasses.replace(Chip(0), process_index=i // 2) for i in range(8)]
    mesh = SimpleNamespace(
        devices=np.array(owned).reshape(partition.mesh.devices.shape),
        axis_names=partition.mesh.axis_names,
        shape=partition.mesh.shape,
    )
    theirs = SimpleNamespace(mesh=mesh, axes_of=partition.axes_of, devices_of=partition.devices_of)
    assert [rows_of_process(theirs, process) for process in range(4)] == wanted
