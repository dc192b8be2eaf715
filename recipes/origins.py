"""What a stage began with: noted in its folder before it trains, compared when it goes on.

A stage goes on from its own checkpoints, whatever parameters it is given then. Without a note of
those that it once began with, a run folder given another base, or a stage whose predecessor was
trained anew, would be reported as one chain.

    RUN/STAGE/origin.json    the folder and step begun with, and a digest of the parameters

The digest alone is compared: a base may be moved, copied or converted without loss. Folder and step
are for people, and the step tells before anything is loaded that a stage has been trained on since.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from mmx.convert.source import is_run
from mmx.data.shards import write_atomic
from mmx.model import Params
from mmx.training.agreement import by_first, compile_together
from mmx.training.checkpoint_arrays import description, named
from mmx.training.folders import complete, step_folders
from mmx.training.runs import CHECKPOINTS, run_config

FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Parameters, where they lay, and after which step; None where that is no run."""

    folder: str
    step: int | None
    params: str

    def __str__(self) -> str:
        step = "" if self.step is None else f" at step {self.step}"
        return f"{self.folder}{step} (parameters {self.params[:12]})"


def origin_of(folder: Path, params: Params) -> Origin:
    """Of what was just loaded from a run or a checkpoint folder."""
    return Origin(str(folder), run_config(folder)[0] if is_run(folder) else None, digest(params))


def digest(params: Params) -> str:
    """A digest of every bit of the parameters, the same however devices and processes share them.

    Sums of integers mod 2^32, which are exact in any order, made where the parameters lie: no host
    holds those of a large model. It tells apart what training or a mistake has changed; it is not
    made against forgery.
    """
    leaves = named(params)
    compile_together(_sums, leaves)
    sums = jax.device_get(_sums(leaves))
    found = {name: [int(number) for number in sums[name]] for name in leaves}
    return hashlib.sha256(
        json.dumps([description(leaves), found], sort_keys=True).encode()
    ).hexdigest()


@jax.jit
def _sums(leaves: dict[str, Any]) -> dict[str, tuple[UInt32[Array, ""], ...]]:
    return {n: tuple(_sum(leaf, salt) for salt in (0, 0x9E3779B9)) for n, leaf in leaves.items()}


def _sum(leaf: Shaped[Array, "..."], salt: int) -> UInt32[Array, ""]:
    """Every element's bits, mixed with its place in the array, added up."""
    place = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        place *= jnp.uint32(size)
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    unsigned = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    return jnp.sum(_mixed(bits ^ _mixed(place ^ jnp.uint32(salt))), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last steps of MurmurHash3: one to one, and each bit changes half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def begin(stage: Path, origin: Origin) -> None:
    """Note what a stage begins with, or compare with what it began with; of all processes.

    Raises:
      ValueError: it has checkpoints and began with other parameters, or with nobody knows which; or
        its folder cannot be written.
    """

    def note() -> None:
        if not _steps(stage):  # nothing of what was trained before, if anything, is used
            stage.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(origin), indent=1) + "\n"
            write_atomic(stage / FILE, text.encode())
        elif (began := _began(stage)).params != origin.params:
            raise ValueError(f"{stage}: began with {began}, not with {origin}; {_remedy(stage)}")

    try:
        by_first(note)
    except OSError as error:
        raise ValueError(f"{stage}: {error.strerror}; choose another --run-dir") from None


def check_chain(stages: Sequence[Path], steps: Sequence[int]) -> None:
    """Refuse stages that would be trained on although later ones began with them as they are.

    Args:
      stages: their folders, in order.
      steps: asked for of each.

    Raises:
      ValueError: see above; or a stage has checkpoints and does not say what it began with.
    """
    for (stage, after), wanted in zip(itertools.pairwise(stages), steps, strict=False):
        if not _steps(after):
            continue
        began, (whole, faults) = _began(after), complete(stage / CHECKPOINTS)
        done = max(whole, default=0)
        if faults and (done < wanted or done != began.step):
            raise ValueError(
                f"{stage}: {list(faults.values())[-1]}; bring the files back, or {_remedy(stage)}"
            )
        if done < wanted or done != began.step:
            now = f"has {done} of {wanted} steps" if done < wanted else f"is at step {done}"
            raise ValueError(
                f"{after}: began with {began}, but {stage}, which comes before it, {now} now; "
                f"{_remedy(after)}"
            )


def _steps(stage: Path) -> list[int]:
    """Those that were saved, damaged ones too: files may be brought back."""
    return list(step_folders(stage / CHECKPOINTS))


def _began(stage: Path) -> Origin:
    try:
        return Origin(**json.loads((stage / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"{stage}: has checkpoints and no readable {FILE}, which says what it began with; "
            f"{_remedy(stage)}"
        ) from None


def _remedy(stage: Path) -> str:
    return f"choose another --run-dir, or remove {stage} and the stages after it to train them anew"
