"""What an equation of a jaxpr says of itself: its products, its bytes, the jaxprs in it."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_JAXPRS = (ClosedJaxpr, Jaxpr)


def dot_flops(eqn: Any) -> float:
    """2 x batch x rows x columns x inner of a dot_general."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * inner


def inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs in an equation's parameters, that of a derivative not taken left out."""
    if eqn.primitive.name.startswith(("custom_vjp_call", "custom_jvp_call")):
        yield opened(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")))
        return
    for value in eqn.params.values():
        # By type alone: a plan asks this of a million values.
        if type(value) in _JAXPRS:
            yield opened(value)
        elif type(value) in (tuple, list):
            yield from (opened(one) for one in value if type(one) in _JAXPRS)


def opened(jaxpr: Any) -> Jaxpr:
    """A jaxpr, whether or not it came with its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation, those of jaxprs inside after the one they are in."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def products(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every dot_general, at any depth."""
    return (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general")


def product_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the products, loops taken once: to compare branches."""
    return sum(map(dot_flops, products(jaxpr)))


def size_of(v: Any) -> float:
    """Bytes of the array as its shape says."""
    shape = getattr(v.aval, "shape", ())
    dtype = getattr(v.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def stored_size(v: Any, made: dict) -> float:
    """Bytes of an operand before casts that fuse with its reader; `made` has who made what."""
    size = size_of(v)
    while not isinstance(v, Literal) and v in made:
        eqn = made[v]
        if eqn.primitive.name not in ("convert_element_type", "reshape", "transpose", "squeeze"):
            break
        v = eqn.invars[0]
        size = min(size, size_of(v))
    return size


def groups_used(groups: int, rows: float) -> float:
    """Groups that any of so many rows is in, when each goes anywhere alike."""
    return groups * (1 - (1 - 1 / groups) ** rows)


def fixed_turns(eqn: Any) -> int | None:
    """Turns of a loop from a number to a number, as `fori_loop` writes it."""
    cond = eqn.params["cond_jaxpr"].jaxpr
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
        return None
    consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    given = (*eqn.invars[:consts], *eqn.invars[consts + body_consts :])
    known = dict(zip(cond.invars, given, strict=True))
    ends = [v if isinstance(v, Literal) else known.get(v) for v in cond.eqns[0].invars]
    if not all(isinstance(end, Literal) for end in ends):
        return None
    first, last = (int(end.val) for end in ends)  # pyright: ignore[reportOptionalMemberAccess]
    return max(0, last - first)


def visited_share(eqn: Any, grid: list[int]) -> float:
    """The share of its grid that splash attention computes: causal blocks, given their table."""
    if "splash" not in str(eqn.params.get("name_and_src_info", eqn.params.get("name", ""))):
        return 1
    tables = [v.aval.shape for v in eqn.invars if str(getattr(v.aval, "dtype", "")) == "int8"]
    if not tables:
        return 1
    rows, columns = tables[0][-2:]
    seen = sum(min(columns, math.ceil((row + 1) * columns / rows)) for row in range(rows))
    return seen / (rows * columns)
