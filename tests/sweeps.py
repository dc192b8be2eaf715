"""Cases of which `make test` has time for some; `make test-all` runs the others too."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], quick: Callable[[Any], bool], *, name: Callable = str) -> list[Any]:
    """Parameters for pytest: the cases, marked slow where they are not `quick`."""
    return [
        pytest.param(case, id=name(case), marks=() if quick(case) else pytest.mark.slow)
        for case in cases
    ]
