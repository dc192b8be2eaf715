"""How fast a program could be: of each part the longest of computing, reading and sending.

Every rate is the chip's peak, so a time is a bound that no run beats, not a prediction of one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mmx.planning import network
from mmx.planning.programs import Program
from mmx.planning.walk import PARTS, Collective, Counts
from mmx.training.flops import forward_flops_per_token


@dataclass(frozen=True)
class Part:
    """Times of a part of the model on one device, a step.

    Attributes:
      flops: of one device.
      compute, memory, network: seconds, each alone.
    """

    name: str
    flops: float
    compute: float
    memory: float
    network: float


@dataclass(frozen=True)
class Roofline:
    """Attributes:
    parts: those with anything to do.
    overlapped: seconds a step if messages travel while a part computes.
    serial: seconds a step if they do not.
    tokens: a step.
    model_flops: what the definition of the model asks for, all devices.
    peak: FLOP/s of all devices.
    """

    parts: list[Part]
    overlapped: float
    serial: float
    tokens: int
    model_flops: float
    peak: float

    def share(self, seconds: float) -> float:
        """Share of the peak that the model's own FLOPs are in so many seconds."""
        return self.model_flops / (seconds * self.peak)


def roofline(
    program: Program, counts: Counts, messages: Sequence[Collective], kept: dict[str, float]
) -> Roofline:
    """The bound of a traced program.

    Args:
      program: with the machine.
      counts: of the whole machine.
      messages: named and expected ones, or those of the compiled program.
      kept: bytes of one device by category; the optimizer reads and writes its own.
    """
    topology, devices = program.request.topology, program.request.topology.devices
    sending: dict[str, float] = defaultdict(float)
    for message in messages:
        sending[message.part] += network.seconds(message, topology, program.request.mesh)
    parts = []
    for name in PARTS:
        flops, moved = counts.flops[name] / devices, counts.bytes[name] / devices
        if name == "optimizer" and program.request.mode == "train":
            moved = 2 * (kept.get("parameters", 0) + kept.get("optimizer", 0))
            moved += kept.get("parameters", 0)  # the gradients, in fp32
        part = Part(
            name,
            flops,
            flops / topology.device_flops,
            moved / topology.device_hbm_rate,
            sending[name],
        )
        if part.compute or part.memory or part.network:
            parts.append(part)
    return Roofline(
        parts,
        overlapped=sum(max(p.compute, p.memory, p.network) for p in parts),
        serial=sum(max(p.compute, p.memory) + p.network for p in parts),
        tokens=program.request.tokens,
        model_flops=model_flops(program),
        peak=topology.device_flops * devices,
    )


def model_flops(program: Program) -> float:
    """FLOPs of a step by the definition of the model, nothing computed twice."""
    ask = program.request
    flops = forward_flops_per_token(ask.config, ask.seq)
    if ask.mode == "train":
        return 3 * flops.total * ask.tokens
    if ask.mode == "prefill":
        return (flops.total - flops.head) * ask.tokens + flops.head * ask.batch
    # One token after `seq`: it sees every key, where a prompt's see half of them.
    attention = ask.config.layer_kinds.count("softmax") * (
        4 * ask.config.num_heads * ask.config.head_dim * ask.seq
    )
    state = ask.config.layer_kinds.count("lightning") * (
        4 * ask.config.num_heads * ask.config.head_dim**2
    )
    rest = flops.total - flops.softmax_attention - flops.lightning_attention
    return (rest + attention + state) * ask.tokens
