"""AdamW with global-norm clipping, from optax; which parameters decay is read off their specs."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from mmx.config import ModelConfig
from mmx.model import param_specs

MomentDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW: update = -rate (m / (sqrt(v) + eps) + weight_decay p), m and v bias-corrected.

    Betas and decay are MiniMax-01's (paper, section 4.2), which names neither eps nor clipping;
    1e-8 and a norm of 1 are what others use.

    Attributes:
      beta1, beta2: decay of the moments, in [0, 1).
      eps: added to the root of the second moment; above 0.
      weight_decay: times the learning rate; on matrices only, see `decays`.
      clip_norm: gradients with a larger global norm are scaled down to it; None does not clip.
      first_moment_dtype: of m between steps; 'bfloat16' saves 2 bytes a parameter and rounds m once
        a step, with beta1 at most 0.99: above that a step changes m by less than its rounding. v is
        fp32 always: in bf16 a change of less than 1/256 of it would be lost.

    Raises:
      ValueError: a field out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    first_moment_dtype: MomentDtype = "float32"

    def __post_init__(self) -> None:
        ranges = {
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "eps": (0 < self.eps < math.inf, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "above 0, or None"),
            "first_moment_dtype": (
                self.first_moment_dtype in get_args(MomentDtype),
                f"one of {', '.join(get_args(MomentDtype))}",
            ),
        }
        if self.first_moment_dtype == "bfloat16":
            ranges["beta1"] = (0 <= self.beta1 <= 0.99, "in [0, 0.99] with a first moment in bf16")
        for name, (ok, wanted) in ranges.items():
            if not ok:
                value = getattr(self, name)
                raise ValueError(f"OptimizerOptions: {name} is {value!r}; it must be {wanted}")


def decays(config: ModelConfig) -> dict[str, Any]:
    """Whether weight decay applies, for every parameter: to matrices, the router's among them.

    Not to norm scales, which are vectors whatever the axes of their stack. Not to the embedding,
    tied or not: decay pulls rows of rare words towards zero, where the gradient of the norm behind
    them grows without bound (OLMo 2, arXiv 2501.00656). The head does decay.
    """
    specs = param_specs(config)
    mask = jax.tree.map(lambda spec: spec.std > 0, specs)
    mask["embed"] = jax.tree.map(lambda _: False, specs["embed"])
    return mask


def make_optimizer(config: ModelConfig, options: OptimizerOptions) -> optax.GradientTransformation:
    """Gradients -> the AdamW update before it is multiplied by -learning rate.

    The rate is left to the step, which knows its number; the count inside the optimizer's state is
    of updates made and corrects the moments' bias. Moments are fp32 unless the options say else.
    """
    clip = (
        optax.identity()
        if options.clip_norm is None
        else optax.clip_by_global_norm(options.clip_norm)
    )
    return optax.chain(
        clip,
        _adam(options),
        optax.add_decayed_weights(options.weight_decay, decays(config)),
    )


def _adam(options: OptimizerOptions) -> optax.GradientTransformation:
    """Optax's Adam in fp32, its first moment kept in the dtype of the options.

    optax's own `mu_dtype` decays m in that dtype, which in bf16 makes another number of beta1.
    """
    adam = optax.scale_by_adam(options.beta1, options.beta2, options.eps)

    def kept(state: Any, dtype: Any) -> Any:
        return state._replace(mu=jax.tree.map(lambda m: m.astype(dtype), state.mu))

    def init(params: Any) -> Any:
        return kept(adam.init(params), options.first_moment_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = adam.update(updates, kept(state, jnp.float32), params)
        return updates, kept(new, options.first_moment_dtype)

    return optax.GradientTransformation(init, update)
