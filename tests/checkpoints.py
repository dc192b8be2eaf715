"""Tiny checkpoints for tests, written and read without mmx and without the safetensors library.

The names and shapes here are a second list on purpose: tests compare mmx's table with it.
"""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
# The text models; of the vision model's cases the weights alone are here.
GOLDEN_NAMES = sorted(
    str(p.parent.relative_to(GOLDEN))
    for family in ("released", "text")
    for p in GOLDEN.glob(f"{family}/*/config.json")
)
VISION = "vl/v1_wide"
RELEASED = "released/o1_fp32_3shards"
RELEASED_BF16 = "released/o2_bf16_4shards_zero_based"
TRANSFORMERS = "text/p01_default_pattern"
INDEX = "model.safetensors.index.json"

Tensors = dict[str, np.ndarray]
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# ---------------------------------------------------------------- the safetensors format


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data: 8 bytes of length, that many of JSON, then the tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def shard_digest(content: bytes, digests: Mapping[str, str]) -> str:
    """A file's digest in a manifest: of the digests of its header and of each tensor, in order."""
    header = content[: len(content) - len(split_file(content)[1])]
    joined = hashlib.sha256(header).hexdigest() + "".join(digests.values())
    return hashlib.sha256(joined.encode()).hexdigest()


def join_file(header: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def read_file(file: Path) -> Tensors:
    header, data = split_file(file.read_bytes())
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*info["data_offsets"])], _DTYPES[info["dtype"]]).reshape(
            info["shape"]
        )
        for name, info in header.items()
    }


def write_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, parts, offset = {}, [], 0
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        offsets = [offset, offset + len(part)]
        shape = list(array.shape)
        header[name] = {"dtype": _NAMES[array.dtype], "shape": shape, "data_offsets": offsets}
        parts.append(part)
        offset += len(part)
    file.write_bytes(join_file(header, b"".join(parts)))


# ---------------------------------------------------------------- folders


def read_fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_folder(folder: Path) -> Tensors:
    """All tensors of all shards."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= read_file(file)
    return tensors


def write_folder(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    shards: Sequence[str] = (),
) -> Path:
    """A checkpoint: one file, or shards of these names with every n-th tensor in each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if not shards:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    for i, shard in enumerate(shards):
        write_file(folder / shard, {name: tensors[name] for name in names[i :: len(shards)]})
    weight_map = {name: shards[i % len(shards)] for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def copy_golden(name: str, folder: Path) -> Path:
    """A golden checkpoint that a test may spoil; without its recorded numbers."""
    return Path(shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("golden.*")))


def edit_fields(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_fields(folder), **changes}))


def edit_index(folder: Path, **changes: Any) -> None:
    """Replace entries of the weight map."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder: Path, shard: str, edit: Callable[[Tensors], Any]) -> None:
    """Change the tensors of one shard in place."""
    tensors = read_file(folder / shard)
    edit(tensors)
    write_file(folder / shard, tensors)


# ---------------------------------------------------------------- names and shapes


def released_fields(**changes: Any) -> dict[str, Any]:
    """A small config in the released schema; every width differs from every other."""
    return {
        "model_type": "minimax_text_01",
        "vocab_size": 23,
        "hidden_size": 10,
        "num_hidden_layers": 4,
        "attn_type_list": [0, 1, 0, 1],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rotary_dim": 2,
        "rope_theta": 10000.0,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size": 7,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    } | changes


def shapes(
    fields: Mapping[str, Any], layout: Literal["separate", "fused"] = "separate"
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released-schema config, as torch holds it: [out, in]."""
    vocab, width = fields["vocab_size"], fields["hidden_size"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim, hidden = fields["head_dim"], fields["intermediate_size"]
    experts, shared = fields["num_local_experts"], fields["shared_intermediate_size"]
    inner = heads * dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer, kind in enumerate(fields["attn_type_list"]):
        at = f"model.layers.{layer}."
        found[at + "input_layernorm.weight"] = (width,)
        found[at + "post_attention_layernorm.weight"] = (width,)
        if kind == 0:
            found[at + "self_attn.qkv_proj.weight"] = (3 * inner, width)
            found[at + "self_attn.output_gate.weight"] = (inner, width)
            found[at + "self_attn.norm.weight"] = (inner,)
            found[at + "self_attn.out_proj.weight"] = (width, inner)
        else:
            found[at + "self_attn.q_proj.weight"] = (inner, width)
            found[at + "self_attn.k_proj.weight"] = (kv_heads * dim, width)
            found[at + "self_attn.v_proj.weight"] = (kv_heads * dim, width)
            found[at + "self_attn.o_proj.weight"] = (width, inner)
        if layout == "fused":
            found[at + "mlp.gate.weight"] = (experts, width)
            found[at + "mlp.experts.gate_up_proj"] = (experts, 2 * hidden, width)
            found[at + "mlp.experts.down_proj"] = (experts, width, hidden)
        else:
            found[at + "block_sparse_moe.gate.weight"] = (experts, width)
            for expert in range(experts):
                mlp = at + f"block_sparse_moe.experts.{expert}."
                found[mlp + "w1.weight"] = (hidden, width)
                found[mlp + "w2.weight"] = (width, hidden)
                found[mlp + "w3.weight"] = (hidden, width)
        if shared:
            found[at + "shared_mlp.gate_proj.weight"] = (shared, width)
            found[at + "shared_mlp.up_proj.weight"] = (shared, width)
            found[at + "shared_mlp.down_proj.weight"] = (width, shared)
            found[at + "coefficient.weight"] = (1, width)
    found["model.norm.weight"] = (width,)
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, width)
    return found


def random_tensors(
    wanted: Mapping[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0
) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in wanted.items()
    }


def fuse(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The same weights with the experts of a layer in two tensors, as transformers holds them."""
    fused: Tensors = {}
    for name, array in tensors.items():
        if ".block_sparse_moe.gate." in name:
            at = name.removesuffix("block_sparse_moe.gate.weight")
            experts = range(array.shape[0])
            w1, w2, w3 = (
                [tensors[f"{at}block_sparse_moe.experts.{e}.w{i}.weight"] for e in experts]
                for i in (1, 2, 3)
            )
            gate_up = [np.concatenate(pair) for pair in zip(w1, w3, strict=True)]
            fused[at + "mlp.gate.weight"] = array
            fused[at + "mlp.experts.gate_up_proj"] = np.stack(gate_up)
            fused[at + "mlp.experts.down_proj"] = np.stack(w2)
        elif ".block_sparse_moe.experts." not in name:
            fused[name] = array
    return fused


def size(shape: Sequence[int]) -> int:
    return math.prod(shape)
