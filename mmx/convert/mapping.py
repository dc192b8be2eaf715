"""One table from Hugging Face tensors to parameters, read in both directions.

A row says which tensor of a checkpoint is (part of) which parameter. All matrices are related in
one way: the checkpoint holds [out, in], a parameter is that transposed and reshaped, so that heads
and channels have axes of their own. `entries` expands the rows over layers and experts.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmx.config import ModelConfig
from mmx.model import param_specs
from mmx.nn.layers import ParamSpec

Layout = Literal["separate", "fused"]

# Decay tables that transformers may store; `mmx.config.decay_slopes` computes them.
BUFFERS = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
)
# VL-01 holds the text model under a prefix, beside the vision model.
VL_TEXT_PREFIX = "language_model."
VL_VISION = re.compile(r"(vision_tower\.|multi_modal_projector\.|image_newline$)")

_LAYER = "model.layers.{layer}."
_MODEL_ROWS = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_LAYER_ROWS = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "moe/shared_expert/gate_proj": "shared_mlp.gate_proj.weight",
    "moe/shared_expert/up_proj": "shared_mlp.up_proj.weight",
    "moe/shared_expert/down_proj": "shared_mlp.down_proj.weight",
    "moe/shared_coefficient": "coefficient.weight",
}
_KIND_ROWS = {
    "lightning": {
        "attention/qkv_proj": "self_attn.qkv_proj.weight",
        "attention/gate_proj": "self_attn.output_gate.weight",
        "attention/norm/scale": "self_attn.norm.weight",
        "attention/out_proj": "self_attn.out_proj.weight",
    },
    "softmax": {
        "attention/q_proj": "self_attn.q_proj.weight",
        "attention/k_proj": "self_attn.k_proj.weight",
        "attention/v_proj": "self_attn.v_proj.weight",
        "attention/out_proj": "self_attn.o_proj.weight",
    },
}
_EXPERT_ROWS: dict[Layout, dict[str, str]] = {
    "separate": {
        "moe/router/kernel": "block_sparse_moe.gate.weight",
        "moe/gate_proj": "block_sparse_moe.experts.{expert}.w1.weight",
        "moe/up_proj": "block_sparse_moe.experts.{expert}.w3.weight",
        "moe/down_proj": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    "fused": {
        "moe/router/kernel": "mlp.gate.weight",
        "moe/gate_proj": "mlp.experts.gate_up_proj",
        "moe/up_proj": "mlp.experts.gate_up_proj",
        "moe/down_proj": "mlp.experts.down_proj",
    },
}
# Rows [begin, end) of the fused gate_up_proj, in units of the expert width.
_FUSED_PART = {"moe/gate_proj": 0, "moe/up_proj": 1}
# Stored as they are, not transposed.
_COPIED = ("scale", "embedding")
# Output projections split their input into heads; all others their output.
_OUTPUT = "attention/out_proj"


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, or one expert's slice of it, and where it belongs.

    Attributes:
      key: name of the tensor in the checkpoint.
      path: path of the parameter, joined by '/'.
      index: leading indices of the parameter that the tensor fills (superblock, expert).
      key_shape: shape of the whole tensor under `key`.
      key_slice: the part of that tensor meant, one slice or index a leading dimension.
      transpose: whether the part is [out, in] and the parameter [in, out], axes split.
      shape: shape of the filled part of the parameter.
    """

    key: str
    path: str
    index: tuple[int, ...]
    key_shape: tuple[int, ...]
    key_slice: tuple[int | slice, ...]
    transpose: bool
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the meant part of the tensor: [out, in], or `shape` where nothing is turned."""
        if not self.transpose:
            return self.shape
        inputs = math.prod(self.shape[: self._split])
        return math.prod(self.shape[self._split :]), inputs

    @property
    def cut(self) -> int:
        """The dimension of `shape` along which rows of the matrix lie: its first output axis."""
        return self._split if self.transpose else 0

    @property
    def row_unit(self) -> int:
        """Rows of the matrix that one step along the first output axis of the parameter takes."""
        return math.prod(self.shape[self._split + 1 :]) if self.transpose else 1

    def to_param(self, part: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A part of the checkpoint's tensor, laid out as the parameter; a view where it can be.

        Args:
          part: the whole matrix, or the box of it that `box` names.
          shape: of the region that the box fills; None for all of it.
        """
        return (part.T if self.transpose else part).reshape(self.shape if shape is None else shape)

    def from_param(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`, of the whole or a region of it; a view where it can be."""
        if not self.transpose:
            return part
        return part.reshape(math.prod(part.shape[: self._split]), -1).T

    def box(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        """Rows and columns of the matrix that fill a region of the parameter.

        Args:
          region: a slice a dimension of `shape`; of the input axes and of the output axes only the
            first may be a true part.
        """
        if not self.transpose:
            return region
        split, shape = self._split, self.shape
        for axis, (part, size) in enumerate(zip(region, shape, strict=True)):
            if axis not in (0, split) and part != slice(0, size):
                raise ValueError(f"{self.path}: axis {axis} of {shape} cannot be cut; cut another")
        inner = math.prod(shape[1:split])
        rows, columns = region[split], region[0]
        return (
            slice(rows.start * self.row_unit, rows.stop * self.row_unit),
            slice(columns.start * inner, columns.stop * inner),
        )

    def region(self, rows: slice) -> tuple[slice, ...]:
        """What rows of the matrix, multiples of `row_unit`, fill in the parameter: leading axes."""
        if not self.transpose:
            return (rows,)
        cut = slice(rows.start // self.row_unit, rows.stop // self.row_unit)
        return (*(slice(0, n) for n in self.shape[: self._split]), cut)

    def locate(self, box: tuple[slice, ...]) -> tuple[int | slice, ...]:
        """A box of the matrix as indices into the whole tensor under `key`."""
        if not self.key_slice or not box:
            return (*self.key_slice, *box)
        *leading, last = self.key_slice
        if not isinstance(last, slice):
            return (*self.key_slice, *box)
        rows = slice(last.start + box[0].start, last.start + box[0].stop)
        return (*leading, rows, *box[1:])

    @property
    def _split(self) -> int:
        """How many axes of the parameter are of its input."""
        return len(self.shape) - 1 if self.path.endswith(_OUTPUT) else 1


def entries(config: ModelConfig, layout: Layout) -> Iterator[Entry]:
    """Every tensor of a checkpoint of this config, in the order of the checkpoint's layers.

    Args:
      layout: 'separate' experts (released, and what transformers writes) or 'fused' ones
        (transformers' own modules).
    """
    specs = param_specs(config)
    for path, key in _MODEL_ROWS.items():
        spec = find(specs, path)
        if spec is not None:
            yield _entry(key, path, (), spec)
    period = len(config.superblock)
    for layer, kind in enumerate(config.layer_kinds):
        superblock, place = divmod(layer, period)
        rows = itertools.chain(
            _KIND_ROWS[kind].items(), _LAYER_ROWS.items(), _EXPERT_ROWS[layout].items()
        )
        for row, key in rows:
            path = f"blocks/layer_{place}/{row}"
            spec = find(specs, path)
            if spec is None:
                continue
            key = _LAYER.format(layer=layer) + key
            if not row.endswith(("moe/gate_proj", "moe/up_proj", "moe/down_proj")):
                yield _entry(key, path, (superblock,), spec)
                continue
            for expert in range(config.num_experts):
                index = (superblock, expert)
                if layout == "separate":
                    yield _entry(key.format(expert=expert), path, index, spec)
                else:
                    yield _fused_entry(key, path, index, spec, _FUSED_PART.get(row))


def with_key(entry: Entry, key: str) -> Entry:
    """The same entry under another name in the checkpoint."""
    return dataclasses.replace(entry, key=key)


def find(specs: Mapping[str, Any], path: str) -> ParamSpec | None:
    """The parameter at this path, or None where the model has none."""
    node: Any = specs
    for name in path.split("/"):
        if name not in node:
            return None
        node = node[name]
    return node


def _entry(key: str, path: str, index: tuple[int, ...], spec: ParamSpec) -> Entry:
    shape = spec.shape[len(index) :]
    if path.endswith(_COPIED):
        return Entry(key, path, index, shape, (), False, shape)
    out_in = _out_in(path, shape)
    return Entry(key, path, index, out_in, (), True, shape)


def _fused_entry(
    key: str, path: str, index: tuple[int, ...], spec: ParamSpec, part: int | None
) -> Entry:
    experts = spec.shape[1]
    shape = spec.shape[2:]
    out, inner = _out_in(path, shape)
    expert = index[1]
    if part is None:
        return Entry(key, path, index, (experts, out, inner), (expert,), True, shape)
    rows = slice(part * out, (part + 1) * out)
    return Entry(key, path, index, (experts, 2 * out, inner), (expert, rows), True, shape)


def _out_in(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a matrix: output projections split their input into heads, others the output."""
    if path.endswith(_OUTPUT):
        return shape[-1], math.prod(shape[:-1])
    return math.prod(shape[1:]), shape[0]
