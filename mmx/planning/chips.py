"""The chips: one table of what each can do, and where that is written.

Rates are the vendors' peaks; nothing here was measured. Interconnect is given for one direction.
"""

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as in `--topology`.
      kind: whose compiler, and which network.
      device_kind: what jax calls its devices.
      devices: devices that jax shows for a chip.
      bf16_flops, int8_ops: dense peak a second.
      hbm_bytes, hbm_rate: memory, and bytes a second.
      vmem_bytes: of one core's vector memory; 0 on GPUs.
      torus: dimensions of the network between chips; 0 is a switch.
      link_rate: TPU: bytes a second over one link, one way. GPU: of all NVLinks of a chip, one way.
      host_chips: chips of a host, which on GPUs are those that NVLink connects.
      outside_rate: bytes a second of one chip to other slices (TPU) or hosts (GPU), one way.
      source: of these numbers.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    device_kind: str
    devices: int
    bf16_flops: float
    int8_ops: float
    hbm_bytes: int
    hbm_rate: float
    vmem_bytes: int
    torus: int
    link_rate: float
    host_chips: int
    outside_rate: float
    source: str


_CLOUD = "cloud.google.com/tpu/docs/"
_TPU_NOTE = "; a link is the chip's bidirectional ICI rate / 2 / links"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", "TPU v4", 1, 275e12, 275e12, 32 * GIB, 1228e9, 16 << 20, 3, 50e9, 4,
            6.25e9, _CLOUD + "v4 (2400 Gbps of ICI one way, six links; DCN taken to be v5p's)",
        ),
        Chip(
            "v5e", "tpu", "TPU v5 lite", 1, 197e12, 394e12, 16 * GIB, 819e9, 128 << 20, 2, 50e9, 4,
            3.125e9, _CLOUD + "v5e (1600 Gbps of ICI one way, four links; 6.4 Tbps DCN a pod)",
        ),
        Chip(
            "v5p", "tpu", "TPU v5", 1, 459e12, 918e12, 95 * GIB, 2765e9, 64 << 20, 3, 100e9, 4,
            6.25e9, _CLOUD + "v5p (1200 GB/s ICI, six links; 50 Gbps DCN a chip)" + _TPU_NOTE,
        ),
        Chip(
            "v6e", "tpu", "TPU v6 lite", 1, 918e12, 1836e12, 32 * GIB, 1640e9, 128 << 20, 2, 100e9,
            4, 12.5e9, _CLOUD + "v6e (800 GB/s ICI, four links; 100 Gbps DCN a chip)" + _TPU_NOTE,
        ),
        Chip(
            "tpu7x", "tpu", "TPU7x", 2, 2307e12, 2307e12, 192 * GIB, 7380e9, 64 << 20, 3, 100e9, 4,
            12.5e9, _CLOUD + "tpu7x (1200 GB/s ICI, six links; 100 Gbps DCN a chip; fp8 is twice "
            "bf16, int8 taken to be bf16's)" + _TPU_NOTE,
        ),
        Chip(
            "h100", "gpu", "NVIDIA H100", 1, 989.5e12, 1979e12, 80 * 10**9, 3350e9, 0, 0, 450e9, 8,
            50e9, "NVIDIA H100 data sheet, SXM, without sparsity (900 GB/s NVLink both ways); "
            "one 400 Gb/s port a GPU as in DGX H100",
        ),
        Chip(
            "h200", "gpu", "NVIDIA H200", 1, 989.5e12, 1979e12, 141 * 10**9, 4800e9, 0, 0, 450e9, 8,
            50e9, "NVIDIA H200 data sheet, SXM, without sparsity (900 GB/s NVLink both ways); "
            "one 400 Gb/s port a GPU as in DGX H200",
        ),
    )
}  # fmt: skip
