"""A traced program as steps, for `memory`: calls written out, views and casts seen through."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from mmx.planning.equations import inner_jaxprs
from mmx.planning.walk import COLLECTIVES

# Their results are views of an operand.
_VIEWS = frozenset(
    {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "optimization_barrier", "name"}
    | {"stop_gradient", "copy", "transpose"}
)
# They read arrays and make arrays; all others are fused with what they read or with who reads them.
WHOLE = frozenset(
    {"dot_general", "ragged_dot_general", "gather", "scatter", "scatter-add", "sort", "concatenate"}
    | {"pallas_call", "scan", "while", "cond", "shard_map", "dynamic_update_slice", "cumsum"}
    | {"custom_partitioning", "ffi_call", *COLLECTIVES}
)
# They change their first operand in its place.
_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add"})
# Written out where they are called.
_CALLS = ("jit", "remat", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
# Variables of a body that are another array made wider, with the dtype of that one.
Widened = Mapping[Any, Any]


@dataclass(frozen=True)
class Step:
    """An equation that is no call and no view, and the numbers of the values it reads and makes.

    `widened` are places among the operands of a scan or a `shard_map` whose value is wider here
    than where it was made, with the dtype it had there.
    """

    eqn: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    widened: tuple[tuple[int, Any], ...] = ()

    @property
    def whole(self) -> bool:
        return self.eqn.primitive.name in WHOLE

    @property
    def reduces(self) -> bool:
        return self.eqn.primitive.name.startswith(("reduce_", "arg"))


class Written(NamedTuple):
    """Steps, the values they end with, and which results are widened, with the dtypes they had."""

    steps: list[Step]
    ends: set[int]
    widened_ends: dict[int, Any]


def steps_of(jaxpr: Jaxpr, widened: Widened, carried: Mapping[Any, Any]) -> Written:
    """The equations of a jaxpr in its order, and the values it returns.

    What is called is written out in place of the call, as XLA has it: else a function of a few
    elementwise lines, `silu` or all that `jax.checkpoint` repeats of them, would seem to take and
    give arrays where it is fused with who calls it. A view is the value that it is a view of; what
    is changed in place, as a loop changes what it carries, is the value that it was. So is what is
    made wider, and what is made as narrow again as it was: XLA casts where it reads.

    Args:
      jaxpr: a program or a body.
      widened: see `Widened`.
      carried: results of a loop's body with the arguments whose place they take: what is made of
        such an argument element by element is made in its place.
    """
    steps: list[Step] = []
    numbers = itertools.count()
    made: set[int | None] = set()  # by equations
    narrow: dict[int | None, Any] = {}  # dtypes of values that are somewhere made wider

    def write(jaxpr: Jaxpr, values: dict[Any, int]) -> list[int | None]:
        def value(v: Any) -> int:
            if v not in values:
                values[v] = next(numbers)
            return values[v]

        def read(variables: Sequence[Any]) -> list[int | None]:
            return [None if isinstance(v, Literal) else value(v) for v in variables]

        def bind(variables: Sequence[Any], given: Sequence[int | None]) -> None:
            pairs = zip(variables, given, strict=False)
            values.update((v, one) for v, one in pairs if one is not None)

        for eqn in jaxpr.eqns:
            given, name = read(eqn.invars), eqn.primitive.name
            if name.startswith(_CALLS):
                (called,) = inner_jaxprs(eqn)
                inside: dict[Any, int] = {
                    v: one for v, one in zip(called.invars, given, strict=True) if one is not None
                }
                bind(eqn.outvars, write(called, inside))
                continue
            first = given[0] if given else None
            view = first is not None and (_is_view(eqn) or _is_free_cast(eqn, first, narrow))
            place = values.get(carried.get(eqn.outvars[0])) if len(eqn.outvars) == 1 else None
            inside_it = place is not None and place in given and name not in WHOLE
            if inside_it:
                bind(eqn.outvars, [place])
            elif view or name in _IN_PLACE:
                bind(eqn.outvars, given[:1])
            elif name in ("scan", "while"):
                bind(eqn.outvars, [one if one in made else None for one in given[carried_by(eqn)]])
            if not view:
                reads = tuple(one for one in given if one is not None)
                changes = inside_it or (name in _IN_PLACE and reads)
                makes = () if changes else tuple(map(value, eqn.outvars))
                steps.append(Step(eqn, reads, makes, tuple(_wider(eqn, given, narrow))))
                made.update(makes)
        return read(jaxpr.outvars)

    given = {v: next(numbers) for v in widened}
    narrow.update((number, widened[v]) for v, number in given.items())
    ends = write(jaxpr, given)
    wider = {
        place: narrow[one]
        for place, (v, one) in enumerate(zip(jaxpr.outvars, ends, strict=True))
        if one in narrow and getattr(v.aval, "dtype", None) != narrow[one]
    }
    return Written(steps, {one for one in ends if one is not None}, wider)


def _is_free_cast(eqn: Any, given: int, narrow: dict[int | None, Any]) -> bool:
    """Whether it widens a value, or undoes that; `narrow` learns what the value was."""
    if eqn.primitive.name != "convert_element_type":
        return False
    was, becomes = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    floats = jnp.issubdtype(was, jnp.floating) and jnp.issubdtype(becomes, jnp.floating)
    if floats and becomes.itemsize > was.itemsize:
        narrow.setdefault(given, was)
        return True
    return narrow.get(given) == becomes


def _wider(
    eqn: Any, given: list[int | None], narrow: dict[int | None, Any]
) -> Iterator[tuple[int, Any]]:
    """Places of the operands that a body reads widened, but for those that it changes."""
    if eqn.primitive.name not in ("scan", "shard_map"):
        return
    changed = range(len(given))[carried_by(eqn)] if eqn.primitive.name == "scan" else ()
    for place, (v, one) in enumerate(zip(eqn.invars, given, strict=True)):
        if one in narrow and v.aval.dtype != narrow[one] and place not in changed:
            yield place, narrow[one]


def _is_view(eqn: Any) -> bool:
    if eqn.primitive.name == "pad":  # by nothing
        return eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
    return eqn.primitive.name in _VIEWS


def carried_by(eqn: Any) -> slice:
    """The operands of a loop that it carries from turn to turn; its first results are theirs."""
    count, scanned = len(eqn.outvars), 0
    if eqn.primitive.name == "scan":
        body = eqn.params["jaxpr"].jaxpr
        count = sum(map(same_shape, body.outvars, eqn.outvars))
        scanned = sum(not same_shape(*pair) for pair in zip(body.invars, eqn.invars, strict=True))
    end = len(eqn.invars) - scanned
    return slice(end - count, end)


def carried_inside(eqn: Any, body: Jaxpr) -> dict[Any, Any]:
    """Of a scan's body: results that are carried on, with the arguments they become."""
    if eqn.primitive.name != "scan":
        return {}
    pairs = zip(body.outvars, body.invars[carried_by(eqn)], strict=False)
    return {result: argument for result, argument in pairs if not isinstance(result, Literal)}


def same_shape(inner: Any, outer: Any) -> bool:
    """Whether a loop has the same of all turns as of one: it is carried, or read by each."""
    return inner.aval.shape == outer.aval.shape
