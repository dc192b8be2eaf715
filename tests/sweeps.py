"""Cases of which `make test` has time for some; `make test-all` runs the others too."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import pytest


def sweep(cases: Iterable[Any], quick: Callable[[Any], bool], *, name: Callable = str) -> list[Any]:
    """Parameters for pytest: the cases, marked slow where they are not `quick`."""
    return [
        pytest.param(case, id=name(case), marks=() if quick(case) else pytest.mark.slow)
        for case in cases
    ]


def in_either_dtype(cases: Iterable[Any]) -> list[Any]:
    """Parameters (case, dtype): fp32 and bf16 in turn; each case's other one is marked slow."""
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{jnp.dtype(dtype)}",
            marks=() if (index + turn) % 2 == 0 else pytest.mark.slow,
        )
        for index, case in enumerate(cases)
        for turn, dtype in enumerate((jnp.float32, jnp.bfloat16))
    ]
