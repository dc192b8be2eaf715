"""MiniMax-01 in JAX: exact hybrid linear-attention models, from checkpoint to logits and text.

Names are imported when they are first used, so that `import mmx` (and `mmx --help`) costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmx.config import ModelConfig as ModelConfig
    from mmx.config import preset as preset
    from mmx.convert.load import load as load
    from mmx.inference.cache import Cache as Cache
    from mmx.inference.cache import init_cache as init_cache
    from mmx.inference.engine import Engine as Engine
    from mmx.inference.generation import generate as generate
    from mmx.inference.requests import Sampling as Sampling
    from mmx.model import ForwardOutput as ForwardOutput
    from mmx.model import abstract_params as abstract_params
    from mmx.model import count_params as count_params
    from mmx.model import forward as forward
    from mmx.model import init_params as init_params
    from mmx.training.losses import loss as loss

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "mmx.config",
    "preset": "mmx.config",
    "load": "mmx.convert.load",
    "Cache": "mmx.inference.cache",
    "init_cache": "mmx.inference.cache",
    "Engine": "mmx.inference.engine",
    "generate": "mmx.inference.generation",
    "Sampling": "mmx.inference.requests",
    "ForwardOutput": "mmx.model",
    "abstract_params": "mmx.model",
    "count_params": "mmx.model",
    "forward": "mmx.model",
    "init_params": "mmx.model",
    "loss": "mmx.training.losses",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
