"""Lower a program for NVIDIA GPUs that are not there: all that can be tried of it without one.

Nothing is compiled. What comes out is that jax takes the whole program with its shardings, and that
the kernels it would run exist for these shapes.
"""

import contextlib
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.sharding_impls import GSPMDSharding

from mmx.planning.programs import Request, abstract_mesh, build

_CALLS = re.compile(r"custom_call @([\w$.]+)")
_MADE_BY = (("mosaic_gpu", "Pallas"), ("__cudnn", "cuDNN"))


@dataclass(frozen=True)
class Lowered:
    """What became of a program.

    Attributes:
      seconds: that it took.
      kernels: by what makes them, how many the program has.
      failure: why there is no program, in one line.
    """

    seconds: float
    kernels: dict[str, int]
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"it does not lower for cuda: {self.failure}"
        kernels = " and ".join(f"{number} {name}" for name, number in self.kernels.items())
        return f"lowered for cuda with {kernels or 'no'} kernels; nothing was compiled"


def make_room(ask: Request) -> None:
    """Let this process have as many CPU devices as it needs, if jax has not found its own yet."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", ask.topology.devices)


def lower_request(ask: Request) -> Lowered:
    """Lower the whole program of a request, with the kernels of its GPUs.

    Raises:
      ValueError: sizes that the mesh cannot share evenly; this process has begun to use jax with
        fewer CPU devices than the topology has GPUs.
    """
    began = time.perf_counter()
    program = build(ask, abstract_mesh(ask.topology, ask.mesh, "own"))

    def anchored(anchor: Any, *arguments: Any) -> Any:
        del anchor
        return program.function(*arguments)

    anchor = _anchor(ask)
    try:
        with jax.sharding.use_abstract_mesh(program.partition.mesh):  # pyright: ignore[reportArgumentType]
            traced = jax.jit(anchored, keep_unused=True).trace(anchor, *program.arguments)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except Exception as error:  # whatever a kernel raises of what it cannot do
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Lowered(time.perf_counter() - began, {}, message[:300])
    calls = Counter(_CALLS.findall(text))
    kernels = {
        name: count
        for start, name in _MADE_BY
        if (count := sum(calls[call] for call in calls if call.startswith(start)))
    }
    return Lowered(time.perf_counter() - began, kernels)


def _anchor(ask: Request) -> jax.ShapeDtypeStruct:
    """A number on as many devices of this CPU as the topology has.

    cuDNN's primitives want devices when they are lowered, of any kind, and a mesh of devices that
    are not there has none. They take them from any argument; that of a `NamedSharding` would have
    to be on the same mesh as all others.
    """
    wanted = ask.topology.devices
    make_room(ask)
    devices = jax.devices("cpu")
    if len(devices) < wanted:
        raise ValueError(
            f"{ask.topology} has {wanted} devices and this process {len(devices)} of its CPU to "
            f"lower for; set jax_num_cpu_devices to {wanted} before jax finds its devices"
        )
    sharding = GSPMDSharding.get_replicated(tuple(devices[:wanted]))
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
