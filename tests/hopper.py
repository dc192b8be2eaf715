"""A Hopper GPU that is not there: kernels for it run in jax's interpreter, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
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
