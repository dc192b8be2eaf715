"""What a stage of the extension began with: the digest, the note of it, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import integrity
from recipes.extension_options import ExtendContext, check_options
from recipes.extension_report import told
from recipes.origins import FILE, Origin, begin, check_chain, digest
from recipes.origins import _mixed as mixed

BASE = Origin("runs/a", 3, "a" * 64)
OTHER = Origin("runs/b", 3, "b" * 64)


def params():
    draw = np.random.default_rng(0).standard_normal
    return {
        "embed": {"weight": jnp.asarray(draw((16, 8)), jnp.float32)},
        "layers": {
            "one": jnp.asarray(draw((3, 8, 8)), jnp.float32),
            "two": jnp.asarray(draw((3, 8, 8)), jnp.bfloat16),
        },
        "norm": jnp.ones((), jnp.float32),
    }


def flipped(leaf, at, bit):
    """The array with one bit of one element flipped."""
    bits = np.asarray(leaf).view(np.dtype(f"uint{8 * leaf.dtype.itemsize}")).copy()
    bits[at] ^= 1 << bit
    return jnp.asarray(bits.view(np.asarray(leaf).dtype))


def test_the_digest_changes_with_every_bit_place_name_and_dtype():
    base = params()
    found = {digest(base)}
    for bit in range(32):
        changed = params()
        changed["embed"]["weight"] = flipped(base["embed"]["weight"], (7, 3), bit)
        found.add(digest(changed))
    for bit in range(16):
        changed = params()
        changed["layers"]["two"] = flipped(base["layers"]["two"], (2, 0, 7), bit)
        found.add(digest(changed))
    one = base["layers"]["one"]
    for leaf in (one[::-1], one.swapaxes(1, 2), one.at[0].set(one[1]), -0.0 * one, 0.0 * one):
        changed = params()
        changed["layers"]["one"] = leaf
        found.add(digest(changed))
    renamed = params()
    renamed["layers"]["three"] = renamed["layers"].pop("one")
    wider = params()
    wider["layers"]["two"] = wider["layers"]["two"].astype(jnp.float32)
    swapped = params()
    swapped["layers"] |= {"one": swapped["layers"]["two"], "two": swapped["layers"]["one"]}
    found |= {digest(renamed), digest(wider), digest(swapped)}
    assert len(found) == 1 + 32 + 16 + 5 + 3


def test_the_digest_is_the_same_however_the_parameters_are_split():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    whole = params()
    for spec in (
        PartitionSpec(),
        PartitionSpec("a"),
        PartitionSpec(("a", "b")),
        PartitionSpec("b"),
    ):
        split = dict(whole, embed=jax.device_put(whole["embed"], NamedSharding(mesh, spec)))
        assert digest(split) == digest(whole)


def test_bits_are_mixed_as_in_murmurhash():
    # From the reference implementation of MurmurHash3: fmix32.
    given = jnp.array([0, 1, 2, 0xDEADBEEF], jnp.uint32)
    assert [int(x) for x in mixed(given)] == [0, 0x514E28B7, 0x30F4C306, 0x0DE5C6A9]


def trained(stage, step):
    """A stage with a checkpoint."""
    folder = stage / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    integrity.write_manifest(folder, step=step)


def test_a_stage_goes_on_with_what_it_began_with_alone(tmp_path):
    stage = tmp_path / "run" / "stage-1-128"
    begin(stage, OTHER)
    begin(stage, BASE)  # nothing is trained yet: another base may be
    assert Origin(**json.loads((stage / FILE).read_text())) == BASE
    trained(stage, 5)
    begin(stage, BASE)
    begin(stage, Origin("moved/a", None, BASE.params))
    with pytest.raises(ValueError) as caught:
        begin(stage, OTHER)
    assert str(caught.value) == (
        f"{stage}: began with runs/a at step 3 (parameters aaaaaaaaaaaa), not with runs/b at step "
        "3 (parameters bbbbbbbbbbbb); choose another --run-dir, or remove "
        f"{stage} and the stages after it to train them anew"
    )
    assert Origin(**json.loads((stage / FILE).read_text())) == BASE
    for spoil in (lambda file: file.write_text("{"), lambda file: file.unlink()):
        spoil(stage / FILE)
        with pytest.raises(ValueError, match=r"no readable origin\.json.*another --run-dir"):
            begin(stage, BASE)


def test_damaged_checkpoints_are_checkpoints(tmp_path):
    """Their files may come back; until then nothing is noted anew, and none is to be removed."""
    stage, after = tmp_path / "stage-1", tmp_path / "stage-2"
    begin(stage, BASE)
    trained(stage, 10)
    begin(after, Origin(str(stage), 10, "c" * 64))
    trained(after, 4)
    (stage / "checkpoints" / "00000010" / "data").unlink()
    with pytest.raises(ValueError, match="began with runs/a"):
        begin(stage, OTHER)
    with pytest.raises(ValueError, match=r"stage-1: .*; bring the files back, or choose"):
        check_chain([stage, after], [10, 10])
    (stage / "checkpoints" / "00000010" / "data").write_text("x")
    check_chain([stage, after], [10, 10])


def test_a_loss_that_nobody_measured_is_told_as_none():
    row = dict.fromkeys(("heldout_loss", "short_loss_before", "short_loss"), 4.0)
    row |= dict(heldout_loss_before=None, seq_len=64, rope_theta=1e4)
    row |= dict(needles={"exact": [1.0], "loss": 2.0})
    assert dict(told(row))["held-out loss"] == "- -> 4.000"


def test_a_folder_that_cannot_be_made_has_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Not a directory; choose another --run-dir"):
        begin(tmp_path / "file" / "stage-1-128", BASE)


def test_no_stage_is_trained_on_below_a_later_one(tmp_path):
    first, second, third = stages = [tmp_path / f"stage-{n}" for n in (1, 2, 3)]
    steps = [10, 10, 10]
    check_chain(stages, steps)
    begin(first, BASE)
    trained(first, 5)
    check_chain(stages, steps)  # interrupted
    trained(first, 10)
    begin(second, Origin(str(first), 10, "c" * 64))
    check_chain(stages, steps)
    check_chain(stages, [20, 10, 10])  # nothing hangs on it yet
    trained(second, 4)
    check_chain(stages, steps)
    check_chain(stages, [10, 20, 10])
    with pytest.raises(ValueError, match="stage-1, which comes before it, has 10 of 20 steps now"):
        check_chain(stages, [20, 10, 10])
    with pytest.raises(ValueError, match="stage-0, which comes before it, has 0 of 10 steps now"):
        check_chain([tmp_path / "stage-0", second, third], steps)
    trained(first, 12)
    with pytest.raises(ValueError, match="which comes before it, is at step 12 now"):
        check_chain(stages, steps)
    (second / FILE).unlink()
    with pytest.raises(ValueError, match=r"stage-2: .* no readable origin\.json"):
        check_chain(stages, steps)


def options(**changes):
    from recipes.extend_context import PRESETS

    fields = vars(PRESETS["demo"]) | changes
    return ExtendContext(**fields)


def with_stage(number, **changes):
    stages = list(options().stages)
    stages[number] = type(stages[number])(**(vars(stages[number]) | changes))
    return options(stages=tuple(stages))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (options(needles=0), "--needles is 0; it must be at least 1"),
        (options(depths=(0.5, 1.5)), r"--depths is 0.5 1.5; it must be one or more in \[0, 1\]"),
        (options(depths=(math.nan,)), "--depths is nan"),
        (options(depths=()), "--depths is empty"),
        (options(documents=0), "--documents is 0"),
        (options(short_len=1), "--short-len is 1; it must be at least 2"),
        (options(capacity_factor=0.0), "--capacity-factor is 0.0"),
        (options(seed=-1), "--seed is -1"),
        (options(save_every=0), "--save-every is 0"),
        (options(stages=()), "--stages is empty"),
        (with_stage(2, steps=0), "--stages.2.steps is 0; it must be at least 1"),
        (with_stage(1, batch_size=0), "--stages.1.batch-size is 0"),
        (with_stage(1, accumulation=-1), "--stages.1.accumulation is -1"),
        (with_stage(1, seq_len=0), "--stages.1.seq-len is 0"),
        (with_stage(2, learning_rate=math.nan), "--stages.2.learning-rate is nan"),
        (with_stage(2, learning_rate=-1e-3), "--stages.2.learning-rate is -0.001"),
        (with_stage(1, rope_theta=0.0), "--stages.1.rope-theta is 0.0"),
        (with_stage(1, mix=(0.0, 0.0, 0.0)), "--stages.1.mix is 0.0 0.0 0.0"),
        (with_stage(1, mix=(2.0, -1.0, 0.0)), "--stages.1.mix is 2.0 -1.0 0.0"),
        (with_stage(2, steps=4), "--stages.2.steps is 4; it must be more: the stage has 4 rows"),
    ],
)
def test_bad_options_are_refused_by_their_flags(recipe, words):
    check_options(options())
    with pytest.raises(ValueError, match=f"^{words}"):
        check_options(recipe)
