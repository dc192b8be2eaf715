import gc
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

# Before any backend exists; tests of sharding need several devices, the others use the first.
jax.config.update("jax_num_cpu_devices", 8)

# The workers and their children share what they compile; an environment's own folder is kept.
COMPILED = "JAX_COMPILATION_CACHE_DIR"

# A compiled program holds some tens of memory maps, of which Linux gives a process 65,530; without
# one more LLVM aborts. Half is left for what a single test compiles.
MOST_MAPS = 30_000

# All that any child needs: a test process has one server, and keeps the list it began with.
PRELOADED = [
    "jax.experimental.multihost_utils",
    "mmx.cli.convert",
    "mmx.convert.check",
    "mmx.convert.source_orbax",
    "mmx.training.loop",
    "optax",
    "pytest",
    "recipes.pretrain",
]


@pytest.fixture(scope="session")
def processes():
    """Children forked from a server that has imported what they need and touched no device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def pytest_configure(config):
    if hasattr(config, "workerinput") or COMPILED in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="mmx-compiled-")
    os.environ[COMPILED] = folder  # before the workers start, and in this process: jax is imported
    jax.config.update("jax_compilation_cache_dir", folder)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="module")
def quick_programs(request):
    """LLVM optimises nothing of what a module compiles, which is most of the time it takes.

    HLO and its passes are the same. For modules whose programs run for moments, and compare within
    a tolerance or with themselves; `make test-all` compiles them as users do.
    """
    jax.clear_caches()  # which do not know this option
    jax.config.update("jax_disable_most_optimizations", quick(request.config))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


def quick(config) -> bool:
    """Whether this is the fast suite, or another part of all tests."""
    return config.option.markexpr != ""


@pytest.fixture
def quick_children(request) -> dict[str, str]:
    """Variables with which children compile in the same way."""
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quick(request.config) else {}


@pytest.fixture(autouse=True)
def few_memory_maps():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
