"""Checkpoints: what is saved comes back bit for bit, on any devices, and to its own config."""

import json
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mmx.integrity import DamagedCheckpoint
from mmx.training.checkpoint import (
    Checkpoints,
    SaveFailed,
    complete_steps,
    read_config,
    restore_params,
)

CONFIG = {"model": {"embed_dim": 16, "layer_kinds": ("lightning", "softmax")}, "seed": 3}
DATA = {"position": 12345678901234567890, "sources": [{"epoch": 2}]}


class Counters(NamedTuple):
    tokens: jax.Array
    empty: jax.Array


@jax.tree_util.register_dataclass
@dataclass
class State:
    """A state as a trainer has it: a class of its own, optax's tuples, keys, several dtypes."""

    params: Any
    optimizer: Any
    key: jax.Array
    raw_key: jax.Array
    counters: Counters


def make_state(seed=0, *, width=16, dtype=jnp.bfloat16):
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(one, (8, width)),
        "blocks": {"0": {"norm": jax.random.normal(two, (width,), jnp.float32).astype(dtype)}},
    }
    optimizer = optax.adamw(1e-3)
    moments = optimizer.init(params)
    _, moments = optimizer.update(params, moments, params)
    counters = Counters(jnp.int32(2_000_000_011), jnp.zeros((0, 3)))
    return State(params, moments, three, jax.random.key_data(one), counters)


def abstract(state):
    def leaf(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

    return jax.tree.map(leaf, state)


def raw(leaf):
    """The bytes of a leaf; NaNs and signed zeros compare like any others."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert raw(a) == raw(b)


def save(folder, step, state=None, **options):
    with Checkpoints(folder, **options) as checkpoints:
        state = make_state(step) if state is None else state
        checkpoints.save(step, state, data=DATA, config=CONFIG)


# ---------------------------------------------------------------- what comes back


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    state.params["embed"] = state.params["embed"].at[0, :3].set(jnp.array([jnp.nan, -0.0, 1e-42]))
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, data=DATA, config=CONFIG)
        checkpoints.wait()
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(7, abstract(state))
    assert_same(restored.state, state)
    assert restored.data == DATA
    assert restored.config == json.loads(json.dumps(CONFIG))
    assert isinstance(restored.state.optimizer[0], optax.ScaleByAdamState)
    draw = jax.random.normal(restored.state.key, (4,))
    assert raw(draw) == raw(jax.random.normal(state.key, (4,)))


def test_what_is_saved_is_the_moment_of_the_call(tmp_path):
    """Donating the arrays and changing the data while the save runs changes nothing in it."""
    scale = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    params = {"w": jnp.arange(1 << 21, dtype=jnp.float32)}
    scale({"w": params["w"] + 0})  # compiled before, so that it runs beside the save
    data = {"position": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params}, data=data, config={})
        data["position"] = 2
        for _ in range(20):
            params = scale(params)
        jax.block_until_ready(params)
        checkpoints.wait()
        restored = checkpoints.restore(1, {"params": params})
        again = scale(jax.tree.map(jnp.copy, restored.state["params"]))
        assert_same(scale(checkpoints.restore(1, {"params": params}).state["params"]), again)
    assert restored.data == {"position": 1}
    assert np.array_equal(restored.state["params"]["w"], np.arange(1 << 21, dtype=np.float32))


def test_parameters_alone(tmp_path):
    state = make_state()
    save(tmp_path, 3, state)
    assert_same(restore_params(tmp_path, 3, abstract(state.params)), state.params)
    assert read_config(tmp_path, 3)["seed"] == 3
    # Optimizer files are not needed, so inference can be given a copy without them.
    for file in (tmp_path / "00000003" / "state").rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert_same(restore_params(tmp_path, 3, abstract(state.params)), state.params)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    assert_same(restore_params(tmp_path, 3, half), rounded)


# ---------------------------------------------------------------- other devices


def _resume(folder, devices, pipe):
    """In a process with that many devices: restore, report, train one step, save."""
    jax.config.update("jax_num_cpu_devices", devices)
    assert jax.device_count() == devices
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    optimizer = optax.adamw(1e-2)
    x = jax.random.normal(jax.random.key(1), (32, 16))

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - 1) ** 2)

    @jax.jit
    def update(params, moments):
        before, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        return before, params, moments, loss(params)

    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        keys = jax.random.split(jax.random.key(0))
        params = {"in": jax.random.normal(keys[0], (16, 24)), "out": jnp.ones((24, 8))}
        params = jax.device_put(params, rows)
        moments = optimizer.init(params)
        state = {"params": params, "optimizer": moments}
        if step is not None:
            state = checkpoints.restore(step, state).state
            assert all(
                leaf.sharding.device_set == rows.device_set for leaf in state["params"].values()
            )
        before, params, moments, after = update(state["params"], state["optimizer"])
        step = (step or 0) + 1
        checkpoints.save(step, {"params": params, "optimizer": moments}, data={}, config={})
    pipe.send((float(before), float(after), {k: np.asarray(v) for k, v in params.items()}))


def test_eight_devices_then_one_then_four(processes, tmp_path):
    """A mesh of 8, of 1 and of 4 devices, each in a process that has no others."""
    previous = None
    for step, devices in enumerate((8, 1, 4), start=1):
        ours, theirs = processes.Pipe()
        child = processes.Process(target=_resume, args=(tmp_path, devices, theirs))
        child.start()
        theirs.close()
        before, after, params = ours.recv()
        child.join(60)
        assert child.exitcode == 0
        assert after < before
        if previous is not None:
            # The parameters are the same bits; sums over shards may be in another order.
            assert before == pytest.approx(previous, rel=1e-5)
        previous = after
        here = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
        stored = restore_params(tmp_path, step, here)
        assert all(raw(stored[k]) == params[k].tobytes() for k in params)


def _one_of_two(folder, address, index, pipe):
    """One of two processes of a run, with two of its four devices."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, index)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = np.arange(64, dtype=np.float32).reshape(16, 4)
    state = {"params": {"w": jax.make_array_from_callback((16, 4), rows, lambda at: whole[at])}}
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, data=DATA, config=CONFIG)
        checkpoints.save(2, state, data=DATA, config=CONFIG, wait=True)
        steps = checkpoints.steps()
        restored = checkpoints.restore(2, abstract(state)).state["params"]["w"]
        same = [np.array_equal(s.data, whole[s.index]) for s in restored.addressable_shards]
        multihost_utils.sync_global_devices("restored")
        if index == 0:
            file = max((folder / "00000002" / "params").rglob("d/*"))
            file.write_bytes(bytes(file.stat().st_size))
        multihost_utils.sync_global_devices("damaged")
        with pytest.raises(DamagedCheckpoint) as caught:
            checkpoints.restore(2, abstract(state))
    pipe.send((steps, same, str(caught.value)))


def test_two_processes(processes, tmp_path):
    """They write one checkpoint, share the check of it and both refuse a damaged one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pipes = [processes.Pipe(duplex=False) for _ in range(2)]
    arguments = [(tmp_path, address, i, pipe[1]) for i, pipe in enumerate(pipes)]
    children = [processes.Process(target=_one_of_two, args=a) for a in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    told = [pipe[0].recv() for pipe in pipes]
    assert [(steps, same) for steps, same, _ in told] == [([2], [True, True])] * 2
    messages = sorted(message for *_, message in told)
    assert sum("its SHA-256 is" in message for message in messages) == 1
    assert sum("damaged, as process" in message for message in messages) == 1


# ---------------------------------------------------------------- which steps there are


def test_keep_and_replace(tmp_path):
    with Checkpoints(tmp_path, keep=2, save_every=10) as checkpoints:
        assert [step for step in range(31) if checkpoints.due(step)] == [10, 20, 30]
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), data=DATA, config=CONFIG, wait=True)
        assert checkpoints.steps() == [20, 30]
        new = make_state(99)
        checkpoints.save(20, new, data=DATA, config=CONFIG, wait=True)
        assert checkpoints.steps() == [20, 30]
        assert_same(checkpoints.restore(20, abstract(new)).state, new)
        # A run that went back to an early step keeps what it saves there.
        checkpoints.save(5, new, data=DATA, config=CONFIG, wait=True)
        assert checkpoints.steps() == [5, 20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000005", "00000020", "00000030"]


def test_a_step_without_a_manifest_is_no_step(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "00000020" / "MANIFEST.json").unlink()
    (tmp_path / "00000030.saving.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=r"step 20 is not complete.*MANIFEST.json: missing"):
            assert checkpoints.latest() == 10
        with pytest.raises(ValueError, match=r"MANIFEST.json: missing"):
            checkpoints.restore(20, abstract(make_state(20)))
        checkpoints.save(20, make_state(21), data=DATA, config=CONFIG, wait=True)
        assert checkpoints.steps() == [10, 20]
        assert_same(checkpoints.restore(20, abstract(make_state())).state, make_state(21))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000020", "notes.txt"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: make_state(width=24), r"norm was saved with shape \[16\], wanted is \[24\]"),
        (lambda: make_state(dtype=jnp.float32), "norm was saved with dtype bfloat16, wanted is fl"),
        (lambda: {"params": make_state().params}, "holds optimizer/0/count, which is not wanted"),
        (lambda: {"params": {"new": jnp.ones(3)}}, "holds no array params/new"),
    ],
)
def test_another_state_is_refused(tmp_path, state, message):
    save(tmp_path, 10)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=message) as caught:
            checkpoints.restore(10, state())
        assert "\n" not in str(caught.value)
        assert_same(checkpoints.restore(10, make_state()).state, make_state(10))


def test_another_config_is_refused(tmp_path):
    save(tmp_path, 10)
    other = {"model": {**CONFIG["model"], "embed_dim": 32}}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"saved with model.embed_dim = 16, wanted is 32"):
            checkpoints.restore(10, make_state(), config=other)
        fewer = {"model": {"embed_dim": 16}}
        with pytest.raises(ValueError, match=r"model.layer_kinds = \[.*wanted is null"):
            checkpoints.restore(10, make_state(), config=fewer)
        checkpoints.restore(10, make_state(), config={"model": CONFIG["model"]})


@pytest.mark.parametrize(
    ("state", "data", "message"),
    [
        (lambda: {"weights": jnp.ones(3)}, {}, "has no 'params'"),
        (lambda: {"params": {"a": jnp.ones(3)}, "step": 4}, {}, "state step is a int"),
        (lambda: {"params": {"a/b": jnp.ones(3)}}, {}, "state 'params/a/b': names"),
        (lambda: {"params": {"a": jnp.ones(3)}}, {"x": {1, 2}}, "data cannot be written as JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path, state, data, message
):
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, state(), data=data, config={})
        with pytest.raises(ValueError, match="step is -1"):
            checkpoints.save(-1, {"params": {"a": jnp.ones(3)}}, data={}, config={})
    assert not (tmp_path / "run").exists()


def test_bad_options_and_steps(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="save_every is 0"):
        Checkpoints(tmp_path, save_every=0)
    with pytest.raises(ValueError, match="holds no step 4; it holds no step"):
        Checkpoints(tmp_path).restore(4, {})
    save(tmp_path, 10)
    with pytest.raises(ValueError, match="holds no step 4; it holds steps 10"):
        restore_params(tmp_path, 4, {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(SaveFailed, match="step 1 could not be saved; no step was lost"):
        checkpoints.save(1, make_state(), data={}, config={})
    assert complete_steps(checkpoints.folder) == []
    checkpoints.close()
