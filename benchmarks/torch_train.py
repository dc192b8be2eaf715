"""The peer of `benchmarks/train.py`: transformers' MiniMax in torch, both optional."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmx.config import ModelConfig

try:
    import torch
    import transformers
except ImportError as error:
    torch = transformers = None
    MISSING = error.name
else:
    MISSING = None

Run = Callable[[], Any]


def make_model(config: ModelConfig) -> Any:
    """`MiniMaxForCausalLM` of this shape with random bf16 weights, ready to train; sdpa."""
    assert torch is not None
    assert transformers is not None
    # What its config cannot say (RoPE width, slopes) costs the same time.
    fields = dataclasses.replace(
        config, rotary_dim=config.head_dim, slope_base="geometric", slope_layer_epsilon=1e-5
    ).to_hf("minimax")
    unwanted = ("model_type", "architectures")
    hf_config = transformers.MiniMaxConfig(**{k: fields[k] for k in fields if k not in unwanted})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.MiniMaxForCausalLM(hf_config)
    model.set_attn_implementation("sdpa")
    model.train()
    return model


def about(model: Any) -> dict[str, Any]:
    """Versions, and the parameters that get gradients."""
    assert torch is not None
    assert transformers is not None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    versions = {"version": transformers.__version__, "torch": torch.__version__}
    return {"peer": "transformers", **versions, "params": trained}


def experts(model: Any) -> Iterator[str]:
    """Set and name the ways to compute the experts: the library's choice, and grouped products."""
    default = getattr(model.config, "_experts_implementation", None) or "default"
    yield default
    if default != "grouped_mm":
        model.set_experts_implementation("grouped_mm")
        yield "grouped_mm"


def programs(model: Any, tokens: np.ndarray) -> tuple[dict[str, Run], Callable[[Any], None]]:
    """What to time by name, each returning its loss, and how to wait for one.

    The update is fused AdamW on bf16 weights and moments.
    """
    assert torch is not None
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.array(tokens)).long().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    synchronize = torch.cuda.synchronize

    def gradients() -> Any:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step() -> Any:
        loss = gradients()
        optimizer.step()
        return loss

    def wait(loss: Any) -> None:
        del loss
        if device.type == "cuda":
            synchronize()

    return {"peer_gradient": gradients, "peer_step": step}, wait


def device() -> tuple[str, dict[str, float]]:
    """Name of the device, and the most memory used so far."""
    assert torch is not None
    if not torch.cuda.is_available():
        return "cpu", {}
    return torch.cuda.get_device_name(), {"peak_GB": torch.cuda.max_memory_allocated() / 1e9}
