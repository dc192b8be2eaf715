"""What a plan counts, against the definition of the model, the compiler and a parse of its own."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from random_models import small_config

import mmx
from mmx.cli import main
from mmx.planning import hlo, implicit
from mmx.planning.network import seconds
from mmx.planning.programs import build, fold, request
from mmx.planning.report import make_plan
from mmx.planning.topology import parse_mesh, parse_topology
from mmx.planning.walk import Collective, Facts, count, live
from mmx.training.flops import forward_flops_per_token
from sharding import MeshConfig, make_mesh


def ask(model="tiny", mode="train", topology="h200:8", mesh="fsdp=8", config=None, **options):
    options = dict(seq=256, batch=8, capacity_factor=None) | options
    return request(
        name=model,
        config=config or mmx.preset(model),
        mode=mode,
        topology=parse_topology(topology),
        mesh=parse_mesh(mesh),
        **options,
    )


def counted(function, *arguments, facts=None):
    return count(live(jax.jit(function).trace(*arguments).jaxpr), facts)


# ---------------------------------------------------------------- the walk


def test_loops_are_multiplied_and_branches_are_not_added():
    """By hand: each product of 8 x 8 matrices is 1024 FLOPs."""
    x = jnp.ones((8, 8))

    def program(x, n):
        def outer(c, _):
            inner, _ = jax.lax.scan(lambda c, _: (c @ c, None), c, None, length=3)
            return inner @ inner, None

        c, _ = jax.lax.scan(outer, x, None, length=5)  # 5 x 4
        c = jax.lax.fori_loop(2, 9, lambda i, c: c @ c, c)  # 7
        c = jax.lax.cond(n > 0, lambda c: c @ c @ c, lambda c: c @ c, c)  # the larger: 2
        unread = c @ c  # noqa: F841
        return jax.checkpoint(lambda c: jnp.sin(c @ c))(c)  # 1

    counts = counted(program, x, 1)
    assert sum(counts.flops.values()) == (20 + 7 + 2 + 1) * 1024
    assert not counts.unknown


def test_a_loop_whose_turns_the_data_says_is_named():
    counts = counted(
        lambda x, n: jax.named_scope("moe")(
            lambda: jax.lax.fori_loop(0, n, lambda i, c: c @ c, x)
        )(),
        jnp.ones((4, 4)),
        3,
    )
    assert counts.unknown == {"moe"}


def test_shapes_inside_shard_map_are_one_device_s():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, y):
        return jax.lax.psum(x @ y, "a")

    run = jax.shard_map(body, mesh=mesh, in_specs=(P("b", "a"), P("a")), out_specs=P("b"))
    counts = counted(run, jnp.ones((8, 16)), jnp.ones((16, 4)))
    assert sum(counts.flops.values()) == 2 * 8 * 16 * 4
    assert counts.collectives == [Collective("all-reduce", ("a",), "other", 1, 4 * 4 * 4)]


@pytest.mark.parametrize("platform", ["h200:1", "v5p:2x2x1"])
def test_forward_products_of_bench_4b_are_those_of_the_definition(platform):
    """Exact but for attention, whose kernels compute whole blocks: the whole within 1 %."""
    config, length, rows = mmx.preset("bench-4b"), 4096, 4
    devices = parse_topology(platform).devices
    program = build(
        ask("bench-4b", "prefill", platform, f"fsdp={devices}", seq=length, batch=rows),
        folded=True,
    )
    counts = count(live(program.trace().jaxpr), program.facts)
    true, tokens = forward_flops_per_token(config, length), length * rows
    assert counts.flops["experts"] == pytest.approx(true.experts * tokens, rel=1e-12)
    dense = true.lightning_projections + true.softmax_projections + true.router
    assert counts.flops["dense"] == pytest.approx(dense * tokens, rel=1e-12)
    assert counts.flops["head"] == pytest.approx(true.head * rows, rel=1e-12)
    total = (true.total - true.head) * tokens + true.head * rows
    assert sum(counts.flops.values()) == pytest.approx(total, rel=0.01)


def test_a_step_is_three_forward_passes_and_what_is_computed_again():
    """Layers are computed again, and the head where its logits come in blocks; nothing else."""
    plain, again = (make_plan(ask("tiny", remat=remat, seq=64)) for remat in ("none", "layer"))
    config, tokens = mmx.preset("tiny"), 8 * 64
    true = forward_flops_per_token(config, 64)
    parts = {part.name: 8 * part.flops for part in plain.bound.parts}
    assert parts["experts"] == pytest.approx(3 * true.experts * tokens, rel=1e-12)
    assert parts["head"] == pytest.approx(3 * true.head * tokens, rel=1e-12)
    more = {part.name: 8 * part.flops for part in again.bound.parts}
    assert more["experts"] == pytest.approx(4 * true.experts * tokens, rel=1e-12)
    assert more["head"] == parts["head"]
    assert 8 * (again.flops_again - plain.flops_again) >= true.experts * tokens


def test_a_folded_program_counts_as_the_whole_one():
    assert fold(mmx.preset("tiny"))[1] == (3, 1)
    config = small("lls" * 2)
    folded, weights = fold(config)
    assert (len(folded.superblock), weights) == (2, (2, 1))
    asked = ask(config=config, topology="h200:4", mesh="expert=2,seq=2", batch=4, seq=64)
    whole, short = (build(asked, folded=folded) for folded in (False, True))
    one, other = (count(live(p.trace().jaxpr), p.facts) for p in (whole, short))
    assert dict(one.flops) == pytest.approx(dict(other.flops), rel=1e-12)
    named = [{(c.kind, c.axes, c.part): (c.count, c.bytes) for c in x.collectives}
             for x in (one, other)]  # fmt: skip
    assert named[0] == named[1]
    assert whole.entries == short.entries


# ---------------------------------------------------------------- messages


def parsed(text: str, sizes: dict[str, int]) -> dict[tuple[str, int], tuple[float, float]]:
    """(kind, devices of a group): calls and bytes; a parse apart from the one it checks.

    Instructions are attributed to loops by the names of computations alone, from the outside in.
    """
    bodies = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    of = {re.match(r"(?:ENTRY )?%?([\w.\-]+)", body)[1]: body for body in bodies}
    turns: dict[str, float] = {}

    def visit(name, times):
        turns[name] = turns.get(name, 0) + times
        for line in of[name].splitlines()[1:]:
            loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            if loop:
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                visit(loop[1], times * (int(known[1]) if known else 1))
                continue
            for called in re.findall(r"(?:calls|branch_computations)=\{?%?([\w.\-]+)", line):
                visit(called, times)
            call = re.search(r" call\(.*to_apply=%?([\w.\-]+)", line)
            if call:
                visit(call[1], times)

    visit(next(name for name, body in of.items() if body.startswith("ENTRY")), 1)
    found: dict = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for name, times in turns.items():
        for line in of[name].splitlines():
            match = re.search(rf"= (.*?) ({kinds})\(", line)
            if not match:
                continue
            arrays = re.findall(r"(f32|s32|u32|pred|bf16)\[([\d,]*)\]", match[1])
            widths = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
            size = sum(widths[t] * math.prod(int(n) for n in d.split(",") if n) for t, d in arrays)
            group = re.search(r"mesh\[([^\]]*)\] \{([^}]*)\}", line)
            devices = 8
            if group:
                each = dict(re.findall(r"'(\w+)'=(\d+)", group[1]))
                devices = math.prod(int(each[a]) for a in re.findall(r"'(\w+)'", group[2]))
            pairs = re.findall(
                r"(\d+),(\d+)", line.partition("source_target_pairs=")[2].split("}}")[0]
            )
            if devices == 1 or (pairs and all(source == target for source, target in pairs)):
                continue  # nobody sends anything
            if match[2] == "reduce-scatter":
                size *= devices
            devices = 0 if match[2] == "collective-permute" else devices
            calls, total = found.get((match[2], devices), (0, 0))
            found[match[2], devices] = (calls + times, total + times * size)
    return found


@pytest.fixture(scope="module")
def step_on_8():
    """A training step of a small model, compiled for 8 CPU devices, and traced."""
    wanted = ask(
        config=small("ls" * 2),
        mesh="expert=4,seq=2",
        seq=64,
        batch=4,
        dtype="float32",
        remat="none",
    )
    mesh = make_mesh(MeshConfig(fsdp=1, expert=4, seq=2), jax.devices())
    program = build(wanted, mesh)
    # The mesh of these devices, not of the GPUs the plan is of: kernels and exchange are CPU's.
    traced = program.function.trace(*program.arguments)
    # Nothing is run: what LLVM makes of it can be slow. The HLO is the same.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return program, live(traced.jaxpr), traced.lower().compile(compiler_options=options)


def small(layers):
    return small_config(layers, num_heads=4, num_kv_heads=2, num_experts=4, embed_dim=32)


def test_messages_of_a_compiled_program_are_those_an_own_parse_finds(step_on_8):
    program, _, compiled = step_on_8
    sizes = program.request.mesh
    text = compiled.as_text()
    ours: dict = {}
    for c in hlo.collectives(text, sizes):
        devices = math.prod(sizes[axis] for axis in c.axes)
        devices = 0 if c.kind == "collective-permute" else devices
        calls, total = ours.get((c.kind, devices), (0, 0))
        ours[c.kind, devices] = (calls + c.count, total + c.bytes)
    assert ours == parsed(text, sizes)
    assert len(ours) >= 4


def test_exchanges_named_in_the_program_are_those_compiled(step_on_8):
    """All-to-alls and permutes are never the compiler's own: calls and bytes are equal."""
    program, jaxpr, compiled = step_on_8
    named = count(jaxpr, program.facts).collectives
    for kind in ("all-to-all", "collective-permute"):
        for axes in {c.axes for c in named if c.kind == kind}:
            here = [c for c in named if (c.kind, c.axes) == (kind, axes)]
            there = hlo.collectives(compiled.as_text(), program.request.mesh)
            there = [c for c in there if (c.kind, c.axes, c.part) == (kind, axes, here[0].part)]
            assert sum(c.count for c in there) == sum(c.count for c in here)
            assert sum(c.bytes for c in there) == sum(c.bytes for c in here)


def test_arrays_that_stay_are_those_of_the_compiled_program(step_on_8):
    program, _, compiled = step_on_8
    stays = sum(entry.device_bytes for entry in program.entries)
    seen = compiled.memory_analysis().argument_size_in_bytes
    assert stays == pytest.approx(seen, abs=64 * len(program.entries))  # alignment


def test_expected_gathers_bring_each_weight_to_each_pass():
    program = build(ask(mesh="fsdp=8", remat="layer"), folded=True)
    found = {(c.kind, c.part): c for c in implicit.messages(program)}
    gathers = found["all-gather", "softmax"]
    config = mmx.preset("tiny")
    weights = 2 * 64 * 64 + 2 * 64 * 2 * 16  # q and out, k and v
    assert gathers.bytes == 3 * config.num_superblocks * 2 * weights
    assert found["reduce-scatter", "softmax"].bytes == gathers.bytes / 3


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("kind", "axes", "wanted"),
    [
        # 1 GB over NVLink, 450 GB/s: 7/8 of it; twice that; between hosts at 50 GB/s.
        ("all-gather", ("tensor",), 0.875e9 / 450e9),
        ("all-reduce", ("tensor",), 1.75e9 / 450e9),
        ("reduce-scatter", ("fsdp",), 0.75e9 / 50e9),
        ("all-to-all", ("tensor",), 0.875e9 / 450e9),
    ],
)
def test_times_of_messages_on_gpus(kind, axes, wanted):
    mesh = dict(data=1, fsdp=4, expert=1, seq=1, tensor=8)
    message = Collective(kind, axes, "dense", 1, 1e9)
    assert seconds(message, parse_topology("h200:8x4"), mesh) == pytest.approx(wanted)


def test_a_ring_of_a_torus_carries_both_ways():
    mesh = dict(data=1, fsdp=8, expert=8, seq=8, tensor=1)
    topology = parse_topology("v5p:8x8x8")
    gather = seconds(Collective("all-gather", ("fsdp",), "dense", 1, 1e9), topology, mesh)
    assert gather == pytest.approx(0.875e9 / 200e9)
    exchange = seconds(Collective("all-to-all", ("fsdp",), "dense", 1, 1e9), topology, mesh)
    assert exchange == pytest.approx(1e9 * 8 / 4 / 200e9)
    split = parse_topology("v5p:8x8x8", slices=2)
    outside = seconds(
        Collective("all-gather", ("data",), "dense", 1, 1e9), split, mesh | {"data": 2}
    )
    assert outside == pytest.approx(0.5e9 / 6.25e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5q:8x8x8", r"no chip of v4, v5e.*the nearest is v5"),
        ("v5p:9x9x9", r"no shape of v5p.*the nearest is v5p:"),
        ("v6e:3x3", r"there are v6e:1x1, v6e:2x2.*nearest is v6e:2x4"),
        ("v5p", r"no shape of v5p"),
        ("h200:16x2", r"no shape of h200"),
    ],
)
def test_unknown_topologies_name_the_nearest(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=4", "the nearest is fsdp"),
        ("fsdp=4,fsdp=2", "names fsdp twice"),
        ("fsdp", "is not AXIS=NUMBER"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_topologies():
    assert parse_topology("v5p:8x8x8", 4).chips == 2048
    assert parse_topology("tpu7x:4x4x4").devices == 128
    assert parse_topology("h200:8x16").devices == 128
    assert parse_topology("h200:8").shape == (8, 1)


# ---------------------------------------------------------------- the command


def run(*arguments):
    return main(["plan", *arguments])


def test_exit_codes_json_and_what_would_make_it_fit(tmp_path, capsys):
    fits = ("tiny", "--mode", "prefill", "--topology", "h200:2", "--seq", "64", "--batch", "4")
    assert run(*fits, "--quick", "--json", str(tmp_path / "plan.json")) == 0
    assert "it fits" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"]
    assert plan["total_bytes"] == sum(plan["memory_bytes"].values())
    # 4096 words of context of 90 GB: keys and values alone are too many.
    large = ("bench-4b", "--mode", "decode", "--topology", "v6e:1x1", "--seq", "1048576")
    assert run(*large, "--batch", "64", "--quick") == 1
    out = capsys.readouterr().out
    assert re.search(r"it does not fit by [\d.]+ GB on each device", out)
    assert "--batch 32" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--topology", "v5x:8x8x8"], "the nearest is"),
        (["--mesh", "fsdp=3"], "the nearest that fits"),
        (["--seq", "100000"], "max_seq_len=65536"),
        (["--batch", "3"], "cannot share evenly"),
        (["--accumulation", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(changes, message, capsys):
    given = {"--mode": "train", "--topology": "h200:2", "--seq": "64", "--batch": "4"}
    given |= dict(zip(changes[::2], changes[1::2], strict=True))
    arguments = [word for pair in given.items() for word in pair]
    assert run("tiny", *arguments, "--quick") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_or_locked_compiler_is_named(monkeypatch, capsys):
    from mmx.planning import aot

    arguments = ("tiny", "--mode", "decode", "--topology", "v5p:2x2x1", "--seq", "64")
    arguments += ("--batch", "4")
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(aot.sys, "prefix", "/nowhere")
    assert run(*arguments) == 2
    assert "pip install 'mmx[tpu]'" in capsys.readouterr().err

    def locked(**options):
        raise RuntimeError("ABORTED: libtpu multi-process lockfile")

    monkeypatch.setattr(aot, "_find_libtpu", lambda: None)
    monkeypatch.setattr(aot.topologies, "get_topology_desc", locked)
    assert run(*arguments) == 2
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD=1" in capsys.readouterr().err


def test_facts_of_experts_and_context():
    """A decode step reads the matrices of few experts, and every key there is."""
    config = mmx.preset("tiny")
    plan = make_plan(ask(mode="decode", mesh="expert=2,tensor=2,fsdp=2", seq=4096, batch=2))
    keys = 2 * config.layer_kinds.count("softmax") * 2 * 4096 * 2 * 16 * 2 // (2 * 2)
    assert plan.memory["keys and values"] == keys
    assert Facts().context == 1
