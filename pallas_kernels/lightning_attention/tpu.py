"""Lightning attention on TPU: one Pallas sweep over the tokens forward, one in reverse backward.

With S the state before a chunk, i and j its tokens, s the slope of the head and g = d loss / d out:

    out_i = e^(-s i) q_i S + sum_(j <= i) e^(-s (i - j)) (q_i . k_j) v_j
    S    <- e^(-s C) S + sum_j e^(-s (C - j)) k_j v_j^T

and, with G the gradient of the state after the chunk, going from the last chunk to the first,

    dq_i = e^(-s i) g_i S^T         + sum_(j <= i) e^(-s (i - j)) (g_i . v_j) k_j
    dk_j = e^(-s (C - j)) v_j G^T   + sum_(i >= j) e^(-s (i - j)) (g_i . v_j) q_i
    dv_j = e^(-s (C - j)) k_j G     + sum_(i >= j) e^(-s (i - j)) (q_i . k_j) g_i
    G   <- e^(-s C) G + sum_i e^(-s i) q_i g_i^T

The arrays stay [B, T, H * D], as a projection makes them: a head is a block of lanes, nothing is
transposed. A program handles a few heads of one row and goes through its tokens in grid steps; the
last grid axis is sequential and carries the state in fp32 VMEM scratch. Products take operands of
the input's dtype and accumulate fp32.

Every decay is e^(-s n) of a number of steps n >= 0, so nothing overflows, and e^(-s n) = 0 where n
is NEVER. Segments and padding only change these numbers of steps, so that variant differs from the
plain one in where they come from: integer rows made in XLA instead of the token's position.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.lightning_attention.segments import segment_runs

# The height of the matrix unit. Longer chunks need more products (2 C D + 2 D^2 multiplications
# a token) and were slower in every chip's simulator.
CHUNK = 128
LANES = 128
MAX_HEAD_DIM = 256
# A number of steps after which every slope, floored at LEAST_SLOPE, has decayed to exactly 0. That
# floor changes nothing: e^(-1e-30 n) rounds to 1 for any length. Cheaper than a select after exp.
NEVER = 1e35
LEAST_SLOPE = 1e-30
# More than any configuration below takes; v5e and v6e would stop at 16 and 32 MiB.
VMEM_LIMIT_BYTES = 32 * 2**20


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `pallas_kernels.lightning_attention`; bf16 or fp32 inputs, head dims up to 256.

    `chunk_size` is ignored: the chunk is always 128. fp32 inputs get true fp32 products, which the
    compiler estimates at five times the cycles of bf16. Head dims other than multiples of 128 are
    padded with zeros, which copies the inputs.
    """
    del chunk_size
    return _lightning_attention(q, k, v, decay_slopes, initial_state, segment_ids, interpret=False)


def unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_slopes: jax.Array,
    *,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int,
) -> str | None:
    """Why these arguments cannot be served, or None.

    The platform is that of the mesh in use if there is one (so that compiling ahead of time for a
    TPU topology is served), else the default backend's.
    """
    del k, decay_slopes, initial_state, segment_ids, chunk_size
    target = platform.target()
    if target != "tpu":
        return f"platform {target!r} (it needs a TPU)"
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {v.dtype} (it takes bfloat16 and float32)"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims K={q.shape[3]}, V={v.shape[3]} (at most {MAX_HEAD_DIM})"
    return None


def _lightning_attention(q, k, v, decay_slopes, initial_state, segment_ids, *, interpret):
    """Bring the arrays into the kernels' layout and back; all of it is differentiable XLA."""
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[3]
    plan = Plan.make(
        length=length,
        heads=heads,
        head_dim=max(key_dim, value_dim),
        dtype=v.dtype,
        segmented=segment_ids is not None,
        interpret=interpret,
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)
    initial_state = _pad(initial_state.astype(jnp.float32), (batch, heads, plan.lanes, plan.lanes))
    rows = None if segment_ids is None else _segment_rows(plan, segment_ids)
    out, final_state = _attention(
        plan,
        *(_to_lanes(plan, x) for x in (q, k, v)),
        jnp.maximum(decay_slopes.astype(jnp.float32), LEAST_SLOPE),
        initial_state,
        rows,
    )
    out = out.reshape(batch, -1, heads, plan.lanes)[:, :length, :, :value_dim]
    return out, final_state[:, :, :key_dim, :value_dim]


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
      length: T of the arrays, at least one chunk; rows past `tokens` are zeros.
      tokens: how many tokens are there to attend.
      heads: H.
      lanes: D, the padded head dim; a multiple of 128.
      group: heads of one program; divides H.
      step: tokens of one grid step, a multiple of the chunk.
      segmented: whether decays come from segment rows.
      interpret: run in the TPU interpreter, on any platform.
    """

    length: int
    tokens: int
    heads: int
    lanes: int
    group: int
    step: int
    segmented: bool
    interpret: bool

    @classmethod
    def make(cls, *, length, heads, head_dim, dtype, segmented, interpret) -> "Plan":
        """Choose the sizes of blocks from the shapes."""
        lanes = math.ceil(head_dim / LANES) * LANES
        # Four heads of bf16 fill the matrix unit; fp32 unrolls into six passes a product, where
        # more heads only make the program long.
        most = 4 if dtype == jnp.bfloat16 else 2
        most = max(1, most * LANES // lanes)
        group = next(n for n in range(most, 0, -1) if heads % n == 0)
        # By the compiler's estimate steps of 1024 save 7 to 11 % of the forward's cycles on v6e and
        # tpu7x and none on v5p. But the backward, which shares the saved states, takes 10 to 12 MiB
        # of VMEM as it is, in blocks that would double, and v4 has 16.
        rows = max(length, CHUNK)
        step = min(512 if dtype == jnp.bfloat16 else 256, rows // CHUNK * CHUNK)
        return cls(rows, length, heads, lanes, group, step, segmented, interpret)

    @property
    def steps(self) -> int:
        """Grid steps along the tokens."""
        return pl.cdiv(self.length, self.step)

    @property
    def chunks(self) -> int:
        """Chunks in a grid step."""
        return self.step // CHUNK

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches past the arrays, where memory holds anything."""
        return self.length % self.step != 0


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, wanted - have) for have, wanted in zip(x.shape, shape, strict=True)])


def _to_lanes(plan: Plan, x: Float[Array, "B tokens H K"]) -> Float[Array, "B T H*D"]:
    x = _pad(x, (x.shape[0], plan.length, plan.heads, plan.lanes))
    return x.reshape(x.shape[0], plan.length, plan.heads * plan.lanes)


# ---------------------------------------------------------------- segments

# Rows of the int32 table that tells the segmented kernels about each token. -1 steps: never.
READER = 0  # run of the token, -1 for padding
WRITER = 1  # the same, -2 for padding: i sees j <= i where READER of i is WRITER of j
COUNT = 2  # real tokens of the chunk up to this one
READ_STEPS = 3  # decays between the state before the chunk and this token reading it
WRITE_STEPS = 4  # decays between this token writing and the state after the chunk
KEPT_STEPS = 5  # decays from the state before the chunk to the one after it; equal in a chunk
TABLE_ROWS = 8  # a sublane tile


def _segment_rows(plan: Plan, segment_ids: Int[Array, "B tokens"]) -> Int[Array, "B 8 padded"]:
    """The table, up to the end of the last grid step."""
    batch = segment_ids.shape[0]
    padded = _pad(segment_ids, (batch, plan.steps * plan.step))
    real, runs = (x.reshape(batch, -1, CHUNK) for x in segment_runs(padded))
    count = jnp.cumsum(real, axis=2, dtype=jnp.int32)
    total, last = count[:, :, -1:], runs[:, :, -1:]
    # The state before the first chunk belongs to the first segment, which is run 0.
    entering = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))
    table = [jnp.zeros_like(runs)] * TABLE_ROWS
    table[READER] = jnp.where(real, runs, -1)
    table[WRITER] = jnp.where(real, runs, -2)
    table[COUNT] = count
    table[READ_STEPS] = jnp.where(real & (runs == entering), count, -1)
    table[WRITE_STEPS] = jnp.where(real & (runs == last), total - count, -1)
    table[KEPT_STEPS] = jnp.broadcast_to(jnp.where(last == entering, total, -1), runs.shape)
    return jnp.stack(table, axis=1).reshape(batch, TABLE_ROWS, -1)


# ---------------------------------------------------------------- differentiation


def _attention_primal(plan, q, k, v, slopes, initial_state, rows) -> tuple[jax.Array, jax.Array]:
    y = _forward(plan, q, k, v, slopes, initial_state, rows, save=False)
    return y["out"], y["final_state"]


def _attention_fwd(plan, q, k, v, slopes, initial_state, rows):
    y = _forward(plan, q, k, v, slopes, initial_state, rows, save=True)
    return (y["out"], y["final_state"]), (q, k, v, slopes, rows, y["states"])


def _attention_bwd(plan, saved, gradients):
    q, k, v, slopes, rows, states = saved
    grad_out, grad_final = gradients
    y = _backward(plan, q, k, v, slopes, rows, states, grad_out, grad_final)
    return y["dq"], y["dk"], y["dv"], None, y["grad_initial"], None


_attention = jax.custom_vjp(_attention_primal, nondiff_argnums=(0,))
_attention.defvjp(_attention_fwd, _attention_bwd)


# ---------------------------------------------------------------- calls


def _forward(plan, q, k, v, slopes, initial_state, rows, *, save):
    """{'out', 'final_state'} and, to save, 'states': S before each grid step, [B, steps*D, H*D]."""
    inputs = {"q": q, "k": k, "v": v, "initial_state": initial_state, "rows": rows}
    outputs = {
        "out": jax.ShapeDtypeStruct(v.shape, v.dtype),
        "final_state": jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
    }
    if save:
        shape = (v.shape[0], plan.steps * plan.lanes, v.shape[2])
        outputs["states"] = jax.ShapeDtypeStruct(shape, v.dtype)
    products = 2 * CHUNK + 2 * plan.lanes
    name = "lightning_forward_save" if save else "lightning_forward"
    return _call(plan, _forward_kernel, name, slopes, inputs, outputs, products=products)


def _backward(plan, q, k, v, slopes, rows, states, grad_out, grad_final):
    """{'dq', 'dk', 'dv', 'grad_initial'}."""
    inputs = {"q": q, "k": k, "v": v, "grad_out": grad_out, "states": states}
    inputs |= {"grad_final": grad_final, "rows": rows}
    outputs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in dict(dq=q, dk=k, dv=v).items()}
    outputs["grad_initial"] = jax.ShapeDtypeStruct(grad_final.shape, jnp.float32)
    products = 5 * CHUNK + 5 * plan.lanes
    return _call(
        plan, _backward_kernel, "lightning_backward", slopes, inputs, outputs, products=products
    )


def _call(plan, kernel, name, slopes, inputs, outputs, *, products):
    """Run `kernel(plan, slopes, inputs, outputs, scratch)` over (row, group of heads, step).

    `products` counts the multiply-adds a token and lane; None among the inputs is left out.
    """
    inputs = {n: x for n, x in inputs.items() if x is not None}
    width = plan.group * plan.lanes
    last = plan.steps - 1

    def at(t):
        return last - t if kernel is _backward_kernel else t

    tokens = pl.BlockSpec((1, plan.step, width), lambda b, g, t, *_: (b, at(t), g))
    state = pl.BlockSpec((1, plan.group, plan.lanes, plan.lanes), lambda b, g, t, *_: (b, g, 0, 0))
    saved = pl.BlockSpec((1, plan.lanes, width), lambda b, g, t, *_: (b, at(t), g))
    rows = pl.BlockSpec((1, TABLE_ROWS, plan.step), lambda b, g, t, *_: (b, 0, at(t)))
    special = {"states": saved, "rows": rows}
    special |= dict.fromkeys(("initial_state", "final_state", "grad_final", "grad_initial"), state)

    def specs(arrays):
        return {n: special.get(n, tokens) for n in arrays}

    scratch = {"state": pltpu.VMEM((plan.group, plan.lanes, plan.lanes), jnp.float32)}
    if not plan.segmented:
        scratch["within"] = pltpu.VMEM((plan.group, CHUNK, CHUNK), jnp.float32)
    if kernel is _backward_kernel:
        shape = (plan.chunks, plan.group, plan.lanes, plan.lanes)
        scratch["entering"] = pltpu.VMEM(shape, inputs["states"].dtype)

    batch = inputs["q"].shape[0]
    chunks = batch * plan.heads * plan.steps * plan.chunks
    moved = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in (*inputs.values(), *outputs.values())
    )
    estimate = pl.CostEstimate(
        flops=2 * chunks * CHUNK * plan.lanes * products,
        bytes_accessed=moved,
        transcendentals=chunks * CHUNK * (2 * plan.lanes + plan.segmented * CHUNK),
    )
    # Left to itself XLA puts whole arrays of some MiB in VMEM, and then the kernel does not fit:
    # seen on tpu7x at T=1024 H=32.
    hbm = pltpu.MemorySpace.HBM
    inputs = {n: pltpu.with_memory_space_constraint(x, hbm) for n, x in inputs.items()}
    return pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape={n: hbm(x.shape, x.dtype) for n, x in outputs.items()},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.heads // plan.group, plan.steps),
            in_specs=[specs(inputs)],
            out_specs=specs(outputs),
            scratch_shapes=[scratch],
        ),
        # Rows and heads may be split over the two cores of a megacore; tokens may not.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        cost_estimate=estimate,
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name=name,
    )(slopes, inputs)


# ---------------------------------------------------------------- kernels
#
# The compiler does not interleave the heads of a program by itself: products of one kind are
# issued for all heads before the next kind, so that the matrix unit always has one to start.


def _forward_kernel(plan, slopes, x, y, scratch):
    state, heads = scratch["state"], range(plan.group)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = x["initial_state"][0]
        _fill_within(plan, slopes, scratch)

    for c in range(plan.chunks):
        chunk = _Chunk(plan, slopes, x, scratch, c, pl.program_id(2))
        q, k, v = (functools.partial(chunk.load, n) for n in ("q", "k", "v"))
        if "states" in y and c == 0:
            for h in heads:
                y["states"][0, :, chunk.lanes(h)] = state[h].astype(y["states"].dtype)
        scores = [_scores(q(h), k(h), chunk.within(h)) for h in heads]
        read = [chunk.from_start(h) * _nn(q(h), state[h]) for h in heads]
        for h in heads:
            state[h] = chunk.advance(h, state[h], _tn(_scale(k(h), chunk.to_end(h)), v(h)))
        for h in heads:
            chunk.store(y["out"], h, read[h] + _nn(scores[h], v(h)))

    @pl.when(pl.program_id(2) == plan.steps - 1)
    def _():
        y["final_state"][0] = state[...]


def _backward_kernel(plan, slopes, x, y, scratch):
    grad_state, entering, heads = scratch["state"], scratch["entering"], range(plan.group)
    step = plan.steps - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        grad_state[...] = x["grad_final"][0]
        _fill_within(plan, slopes, scratch)

    chunks = [_Chunk(plan, slopes, x, scratch, c, step) for c in range(plan.chunks)]
    _refill_states(plan, x, entering, chunks)
    for c, chunk in reversed(list(enumerate(chunks))):
        q, k, v, g = (functools.partial(chunk.load, n) for n in ("q", "k", "v", "grad_out"))
        scores = [_scores(q(h), k(h), chunk.within(h)) for h in heads]
        grad_scores = [_scores(g(h), v(h), chunk.within(h)) for h in heads]
        dk = [chunk.to_end(h) * _nt(v(h), grad_state[h]) for h in heads]
        dv = [chunk.to_end(h) * _nn(k(h), grad_state[h]) for h in heads]
        for h in heads:
            read = _tn(_scale(q(h), chunk.from_start(h)), g(h))
            grad_state[h] = chunk.advance(h, grad_state[h], read)
        for h in heads:
            chunk.store(y["dk"], h, dk[h] + _tn(grad_scores[h], q(h)))
            chunk.store(y["dv"], h, dv[h] + _tn(scores[h], g(h)))
            dq = chunk.from_start(h) * _nt(g(h), entering[c, h])
            chunk.store(y["dq"], h, dq + _nn(grad_scores[h], k(h)))

    @pl.when(pl.program_id(2) == plan.steps - 1)
    def _():
        y["grad_initial"][0] = grad_state[...]


def _refill_states(plan, x, entering, chunks):
    """The states before each chunk of a step, from the one saved before the step.

    Saving all of them instead takes 9 % off the backward's cycles and adds 10 % to the HBM traffic
    of both sweeps. In the larger of compiler estimate and HBM time, forward and backward together
    (T=4096, H=32), refilling is 11 % faster on v5e, 9 % on v6e, even on v5p, 5 % slower on tpu7x.
    """
    for h in range(plan.group):
        saved = x["states"][0, :, chunks[0].lanes(h)]
        entering[0, h] = saved
        state = saved.astype(jnp.float32)
        for c, chunk in enumerate(chunks[:-1]):
            written = _tn(_scale(chunk.load("k", h), chunk.to_end(h)), chunk.load("v", h))
            state = chunk.advance(h, state, written)
            entering[c + 1, h] = state.astype(entering.dtype)


class _Chunk:
    """Chunk number `index` of a grid step: its part of the blocks, and its decays."""

    def __init__(self, plan, slopes, x, scratch, index, step):
        self.plan, self.x, self.scratch = plan, x, scratch
        self.rows = slice(index * CHUNK, (index + 1) * CHUNK)
        self.slopes = [slopes[pl.program_id(1) * plan.group + h] for h in range(plan.group)]
        self.begin = step * plan.step + index * CHUNK
        self._count_steps()

    def _count_steps(self):
        shape = (CHUNK, self.plan.lanes)
        token = lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.plan.ragged:
            self.real = self.begin + token < self.plan.length
        if self.plan.segmented:
            table = self.x["rows"][0, :, self.rows]
            columns = table.T
            same = columns[:, READER : READER + 1] == table[WRITER : WRITER + 1]
            steps = columns[:, COUNT : COUNT + 1] - table[COUNT : COUNT + 1]
            # Real tokens count upwards, so a later one is a negative number of steps away.
            self.within_steps = _steps(jnp.where(same, steps, -1))
            # Taking exp of rows, before they become columns, is slower in the simulator (v6e: 10 %
            # of the forward): it waits for the transpose.
            read = jnp.broadcast_to(columns[:, READ_STEPS : READ_STEPS + 1], shape)
            write = jnp.broadcast_to(columns[:, WRITE_STEPS : WRITE_STEPS + 1], shape)
            kept = jnp.broadcast_to(columns[:1, KEPT_STEPS : KEPT_STEPS + 1], (1, shape[1]))
            self.read_steps, self.write_steps = _steps(read), _steps(write)
        else:
            count = CHUNK
            if self.plan.tokens % self.plan.step:
                count = jnp.clip(self.plan.tokens - self.begin, 0, CHUNK)
            self.read_steps = (token + 1).astype(jnp.float32)
            self.write_steps = jnp.maximum(count - 1 - token, 0).astype(jnp.float32)
            kept = jnp.full((1, shape[1]), count)
        self.kept_steps = kept.astype(jnp.float32)

    def lanes(self, h):
        return slice(h * self.plan.lanes, (h + 1) * self.plan.lanes)

    def load(self, name, h):
        """[C, D] of head h; zeros past the end of the arrays."""
        x = self.x[name][0, self.rows, self.lanes(h)]
        # Selected, never multiplied: what lies there may be NaN.
        return jnp.where(self.real, x, jnp.zeros_like(x)) if self.plan.ragged else x

    def store(self, ref, h, x):
        ref[0, self.rows, self.lanes(h)] = x.astype(ref.dtype)

    def within(self, h):
        """[C, C] decay from token j (lane) to token i (sublane)."""
        if self.plan.segmented:
            return jnp.exp(-self.slopes[h] * self.within_steps)
        return self.scratch["within"][h]

    def from_start(self, h):
        """[C, D] decay from the state before the chunk to each token."""
        return jnp.exp(-self.slopes[h] * self.read_steps)

    def to_end(self, h):
        """[C, D] decay from each token to the state after the chunk."""
        return jnp.exp(-self.slopes[h] * self.write_steps)

    def advance(self, h, state, written):
        """The state, or its gradient, decayed over the chunk, plus what the chunk adds."""
        if self.plan.segmented:
            # Not through a decay of 0: state - state would leave the state's rounding behind.
            state = jnp.where(self.kept_steps < 0, 0.0, state)
        forgotten = _expm1(-self.slopes[h] * jnp.maximum(self.kept_steps, 0.0))
        return state + (forgotten * state + written)


def _fill_within(plan, slopes, scratch):
    """The decays inside a chunk, which are the same for every chunk unless there are segments."""
    if plan.segmented:
        return
    i, j = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    for h in range(plan.group):
        slope = slopes[pl.program_id(1) * plan.group + h]
        scratch["within"][h] = jnp.exp(-slope * _steps(i - j))


def _steps(count):
    """Integers as fp32 numbers of steps; negative ones mean NEVER."""
    return jnp.where(count < 0, NEVER, count.astype(jnp.float32))


def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation; the compiler has no expm1."""
    series = jnp.zeros_like(x)
    for n in range(8, 0, -1):
        series = (x + x * series) / n
    return jnp.where(x > -0.5, series, jnp.exp(x) - 1)


def _scale(x, decay):
    return (x.astype(jnp.float32) * decay).astype(x.dtype)


def _scores(x, y, decay):
    return (_nt(x, y) * decay).astype(x.dtype)


def _dot(x, y, contract):
    """fp32 product of `x` and `y`, both taken in the dtype of an input array."""
    exact = x.dtype == jnp.float32 and y.dtype == jnp.float32
    dtype = jnp.float32 if exact else jnp.bfloat16
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        ((contract), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _nn(x, y):
    """X @ y."""
    return _dot(x, y, ((1,), (0,)))


def _nt(x, y):
    """X @ y.T."""
    return _dot(x, y, ((1,), (1,)))


def _tn(x, y):
    """x.T @ y."""
    return _dot(x, y, ((0,), (0,)))
