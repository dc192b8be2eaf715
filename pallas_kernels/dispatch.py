"""Choose an implementation of an operation, and refuse in one clear sentence.

An operation lists its implementations in order of preference. `None` takes the first one that
supports the arguments; the list always ends with one that supports everything. A name is a demand:
it is used or refused, never replaced in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      name: what the caller writes in `implementation=`.
      call: the function; every implementation of one operation takes the same arguments.
      unsupported: takes those arguments and returns why they cannot be served, or None.
      automatic: whether `implementation=None` may choose it.
    """

    name: str
    call: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda *args, **kwargs: None
    automatic: bool = True


def select(
    operation: str,
    implementations: Sequence[Implementation],
    requested: str | None,
    *args,
    **kwargs,
) -> Implementation:
    """Return the implementation to run for these arguments.

    Raises:
      ValueError: `requested` is not the name of an implementation.
      NotImplementedError: it is, but does not support the arguments; the message says why.
    """
    if requested is None:
        return next(
            i for i in implementations if i.automatic and i.unsupported(*args, **kwargs) is None
        )
    for candidate in implementations:
        if candidate.name == requested:
            reason = candidate.unsupported(*args, **kwargs)
            if reason is not None:
                raise NotImplementedError(
                    f"{operation}: implementation={requested!r} does not support {reason}; "
                    "use implementation='xla', or None to let the platform choose"
                )
            return candidate
    names = ", ".join(repr(i.name) for i in implementations)
    raise ValueError(
        f"{operation}: unknown implementation {requested!r}; choose None or one of {names}"
    )


def with_gradients_of(definition: Callable[..., Any], call: Callable[..., Any]) -> Any:
    """`call` with the gradients of `definition`, which takes the same arrays, in plain jax."""
    function = jax.custom_vjp(call)
    function.defvjp(
        lambda *arrays: (call(*arrays), arrays),
        lambda arrays, grads: jax.vjp(definition, *arrays)[1](grads),
    )
    return function


def concrete(array: jax.Array | np.ndarray) -> np.ndarray | None:
    """The values, or None under jit, where they cannot be looked at."""
    # Through numpy: reducing a concrete jax.Array inside a jit would itself be traced.
    return None if isinstance(array, Tracer) else np.asarray(array)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """fp32 for inputs up to 32 bits, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype that accumulates, and returns, at least fp32.

    fp32 operands get true fp32 products: left to themselves GPUs round them to TF32, TPUs to bf16.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )


def require_floating(operation: str, **arrays: jax.Array) -> None:
    """Raise ValueError unless every array is bf16, fp32 or float64."""
    for name, array in arrays.items():
        if array.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise ValueError(
                f"{operation}: {name} has dtype {array.dtype}; it must be bfloat16 or float32"
            )


def require_one_dtype(operation: str, **arrays: jax.Array) -> None:
    """Raise ValueError unless the arrays are floating and of one dtype."""
    require_floating(operation, **arrays)
    if len({array.dtype for array in arrays.values()}) > 1:
        seen = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise ValueError(f"{operation}: dtypes disagree ({seen}); cast them to one")


def require_shape(operation: str, name: str, array: jax.Array, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless `array` has the shape `wanted`."""
    if array.shape != wanted:
        raise ValueError(f"{operation}: {name} has shape {array.shape}; it must be {wanted}")


def require_int8(
    operation: str,
    matrices: Mapping[str, jax.Array],
    scales: Sequence[jax.Array],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """Raise ValueError unless the matrices are int8 and the scales fp32, of these shapes."""
    if len(scales) != len(matrices):
        raise ValueError(f"{operation}: {len(scales)} scales for {len(matrices)} matrices")
    for (name, matrix), scale, shape in zip(matrices.items(), scales, shapes, strict=True):
        if matrix.dtype != jnp.int8 or scale.dtype != jnp.float32:
            raise ValueError(
                f"{operation}: {name} has dtype {matrix.dtype} and its scale {scale.dtype}; with "
                "scales they must be int8 and float32"
            )
        require_shape(operation, f"the scale of {name}", scale, shape)
