"""What the default backend is, asked while tracing and never when importing."""

import jax

H200_CORES = 132
# What devices that are not there are called, and what they can do.
CAPABILITIES = {"NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0)}


def backend() -> str:
    """'cpu', 'gpu' or 'tpu': the platform that an unplaced computation runs on."""
    return jax.default_backend()


def target() -> str:
    """The platform to compile for: that of the mesh in use if there is one, else `backend()`.

    So compiling ahead of time for a TPU topology finds the TPU kernels on any machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return backend() if device is None else device.platform


def is_tpu() -> bool:
    """Whether the default backend is a TPU."""
    return backend() == "tpu"


def gpu_compute_capability() -> tuple[int, int] | None:
    """(9, 0) for Hopper and so on; None when the target is no NVIDIA GPU that is known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform != backend():
        return CAPABILITIES.get(device.device_kind)
    if backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or not str(capability).replace(".", "").isdigit():
        return None  # ROCm names its architectures gfx...
    major, _, minor = str(capability).partition(".")
    return int(major), int(minor or 0)


def other_than_hopper() -> str | None:
    """Why a kernel for Hopper GPUs does not run here, or None where it does."""
    capability = gpu_compute_capability()
    if capability == (9, 0):
        return None
    seen = backend() if capability is None else f"compute capability {capability}"
    return f"{seen}: it is written for Hopper GPUs (compute capability 9.0)"


def gpu_cores() -> int:
    """Streaming multiprocessors of the GPU; those of an H200 when lowering without one."""
    if backend() != "gpu":
        return H200_CORES
    return jax.devices()[0].core_count


def device_name() -> str:
    """What the default device calls itself, for messages."""
    return jax.devices()[0].device_kind
