"""Compile a program for TPUs that are not there, with libtpu; no TPU is looked for."""

import ctypes
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mmx.planning import hlo
from mmx.planning.programs import Request, build
from mmx.planning.topology import Topology
from mmx.planning.walk import Collective
from sharding import MeshConfig, make_mesh

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are of one device.

    Attributes:
      seconds: that it took.
      arguments, outputs, shared: `shared` are outputs in the place of arguments.
      temporary: of the peak beside these.
      code: of the program itself.
      messages: of the compiled program, loops multiplied.
      failure: why there is none of this, when it did not compile for want of memory.
      needed: bytes of HBM that it asked for then; 0 when the message does not say.
    """

    seconds: float
    arguments: int = 0
    outputs: int = 0
    shared: int = 0
    temporary: int = 0
    code: int = 0
    messages: tuple[Collective, ...] = ()
    failure: str | None = None
    needed: int = 0

    @property
    def total(self) -> int:
        """Peak: arguments, results that are no argument's, what comes and goes, and code."""
        if self.failure is not None:
            return self.needed
        return self.arguments + self.outputs - self.shared + self.temporary + self.code


def compile_request(ask: Request) -> Compiled:
    """Lower and compile the whole program of a request for its topology.

    Raises:
      ValueError: libtpu is missing or held by another process, or knows no such topology.
    """
    _share_arena()
    mesh = device_mesh(ask.topology, MeshConfig(**ask.mesh))
    began = time.perf_counter()
    program = build(ask, mesh)
    traced = program.trace()
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        message = " ".join(str(error).split())
        return Compiled(
            time.perf_counter() - began, failure=_reason(message), needed=_needed(message)
        )
    seconds = time.perf_counter() - began
    stats: Any = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    shared = stats.alias_size_in_bytes
    return Compiled(
        seconds,
        arguments=arguments,
        outputs=outputs,
        shared=shared,
        # Not temp_size_in_bytes: where a loop is, that has arguments among it again. The sum of all
        # allocations is what libtpu itself compares with the memory of a device.
        temporary=stats.total_allocation_bytes - arguments - outputs + shared,
        code=stats.generated_code_size_in_bytes,
        messages=tuple(hlo.collectives(str(compiled.as_text()), ask.mesh)),
    )


def out_of_memory(error: Exception) -> bool:
    """Whether a compiler or a runtime says that memory ran out."""
    return "RESOURCE_EXHAUSTED" in str(error)


# As libtpu writes it where blocks are somewhat, and where they are far, too large.
_KERNEL = re.compile(r"([\w-]+?)(?:\.\d+)? = [^=]*?\bcustom-call\(|:: ([\w-]+?)(?:\.\d+)?$")
_SIZES_SAID = (
    re.compile(r"allocation with size (\S+) and limit (\S+)"),
    re.compile(r"[Uu]sed (\S+) of (\S+) vmem"),
    re.compile(r"\(size=(\d+)\) would exceed memory \(size=(\d+)\)"),
)
_WINDOW = re.compile(r"(\w+ window).{0,60}window shape is (\w+\[[\d,]*\])")


def _reason(message: str) -> str:
    """Which memory, and of a kernel's own which kernel and which of its blocks."""
    if not _in_vmem(message):
        return f"HBM is too small: {message[:300]}"
    kernel, window = _KERNEL.search(message), _WINDOW.search(message)
    where = f" in the kernel {kernel[1] or kernel[2]}" if kernel else ""
    block = f", the {window[1]} {window[2]} among it" if window else ""
    for pattern in _SIZES_SAID:
        if said := pattern.search(message):
            sizes = f"{_plain(said[1])} wanted of {_plain(said[2])}{block}"
            return f"vector memory (VMEM) overflows{where}: {sizes}"
    return f"vector memory (VMEM) overflows{where}: {message[:300]}"


def _in_vmem(message: str) -> bool:
    return re.search(r"\bvmem\b", message, re.IGNORECASE) is not None


def _plain(size: str) -> str:
    return f"{int(size) / (1 << 20):.2f}M" if size.isdecimal() else size


def _needed(message: str) -> int:
    """Bytes of HBM, arguments and results among them whatever libtpu calls it."""
    if _in_vmem(message):
        return 0
    size = r"([\d.]+)([KMGT]?)"
    for said in (rf"Used {size} of", rf"required for HLO temporaries \({size}\)"):
        if found := re.search(said, message):
            return int(float(found[1]) * _SIZES[found[2]])
    return 0


def _share_arena() -> None:
    """Have all threads of this process allocate in one place, and give back what they free.

    Each thread of the compiler else keeps what it once needed: a fifth of the memory of compiling a
    training step. Where the C library is not glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_arena_max, m_trim_threshold = -8, -1
        mallopt(m_arena_max, 1)
        mallopt(m_trim_threshold, 1 << 16)


def device_mesh(topology: Topology, config: MeshConfig) -> Mesh:
    """The mesh of a topology's devices, as libtpu describes them.

    Raises:
      ValueError: libtpu is missing or held by another process, or knows no such topology.
    """
    _find_libtpu()
    # One device a chip, as jax shows v4 on a machine that has it.
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    # The plan needs no device of this machine, and must not wait for one.
    jax.config.update("jax_platforms", "cpu")
    with _quiet() as said:
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name, **options
            )
        except Exception as error:
            raise ValueError(_trouble(f"{error} {said()}", topology)) from None
    return make_mesh(config, list(found.devices), slices=topology.slices)


def _find_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is not None:
        return
    beside = Path(sys.prefix) / "libtpu"
    if not (beside / "libtpu").is_dir():
        raise ValueError(
            "libtpu, the compiler for TPUs, is not installed: pip install 'mmx[tpu]' (no TPU is "
            "needed), or take --quick, which compiles nothing"
        )
    sys.path.append(str(beside))


def _trouble(message: str, topology: Topology) -> str:
    if "lockfile" in message or "ABORTED" in message:
        return (
            "another process holds libtpu: wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to "
            "let several run at once"
        )
    return f"libtpu does not know {topology.name}: {' '.join(message.split())[:200]}"


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keep what libtpu writes about machines it does not find from the screen."""
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(screen, 2)
            os.close(screen)
