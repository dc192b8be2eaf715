"""A Hopper GPU that is not there: kernels for it run in jax's interpreter, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.lightning_attention import gpu_roles
from pallas_kernels.paged_attention import gpu_decode


@contextmanager
def interpreted_hopper(monkeypatch, *, cores: int, detect_races: bool) -> Iterator[None]:
    """Kernels take it for their platform meanwhile.

    Races are found between copies, loads and stores. When a product reads its operands the
    interpreter does not know.
    """

    def product(left, right, original=gpu_decode._product):
        if not isinstance(left, jax.Array):
            return original(left, right)
        return jnp.dot(left, right[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(gpu_decode, "_product", product)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(platform, "gpu_cores", lambda: cores)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield
    jax.clear_caches()


def interpret_sweeps(monkeypatch) -> plgpu.InterpretGPUParams:
    """Sweeps for states alone run with `interpret` of this; see `gpu_sweep.run`.

    The interpreter has no product that is added to a sum, and wants every barrier waited for: the
    warpgroup that moves memory does not wait until the last chunks are used.
    """

    def add_products(state, keys, values):
        total = sum(some[...].astype(jnp.float32) for some in values)
        state = state + jnp.dot(keys[...].astype(jnp.float32).T, total)
        plgpu.commit_smem()  # they have been read, as when a product has been waited for
        return state

    def deallocate(self):
        with self.cv:
            self.ref_count -= 1

    monkeypatch.setattr(gpu_roles, "_add_products", add_products)
    monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate)
    return plgpu.InterpretGPUParams(detect_races=True)
