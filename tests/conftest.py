import multiprocessing

import jax
import pytest

# Before any backend exists; tests of sharding need several devices, the others use the first.
jax.config.update("jax_num_cpu_devices", 8)

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
