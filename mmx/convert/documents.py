"""What a checkpoint folder holds beside tensors: configs, tokenizer, model card.

Only files of a closed list are carried, so never code. What is made here depends on the source's
content alone: no times, no names of machines.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmx.convert.bounded import open_plain
from mmx.convert.checkpoint import plain_file
from mmx.convert.hf_config import OWN_KEYS, RELEASED_TYPES, TRANSFORMERS_TYPE, VL_TYPE, to_hf
from mmx.convert.source import Source

To = Literal["orbax", "hf", "hf-released"]
Dtype = Literal["as-is", "bf16", "fp32"]

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
CARRIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", GENERATION, CARD, "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE",
)  # fmt: skip
MAX_FILE = 256 << 20  # bytes of a carried file
_DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def output_fields(
    source: Source, to: To, dtype: Dtype, stored: str
) -> tuple[dict[str, Any], list[str]]:
    """The output's config.json, and what the reader of the plan should know about it.

    The source's own fields where the schema stays, else those that `ModelConfig.to_hf` writes.

    Args:
      source: the checkpoint.
      to: the form to write.
      dtype: as asked for; recorded where it is not 'as-is'.
      stored: numpy's name of the dtype that most parameters will have.

    Raises:
      ValueError: a config that the form cannot say.
    """
    model_type = None if source.fields is None else source.fields.get("model_type")
    if to == "hf" and model_type == VL_TYPE:
        raise ValueError(
            f"{source.folder}: is a MiniMax-VL-01, and transformers' 'minimax' class has no vision "
            "model; choose --to hf-released or --to orbax"
        )
    keeps = {"orbax": (model_type,), "hf": (TRANSFORMERS_TYPE,),
             "hf-released": (*RELEASED_TYPES, VL_TYPE)}  # fmt: skip
    notes: list[str] = []
    if source.fields is not None and model_type in keeps[to]:
        fields = _without_code(source.fields)
        if fields != source.fields:
            notes.append("config.json: auto_map is left out, since no code is carried")
        if dtype != "as-is":
            fields = _with_dtype(fields, _DTYPE_NAMES[dtype])
        return fields, notes
    fields = to_hf(source.config, TRANSFORMERS_TYPE if to == "hf" else RELEASED_TYPES[0])
    fields["torch_dtype"] = stored
    own = [key for key in OWN_KEYS if key in fields]
    if to == "hf" and "rotary_dim" in fields:
        own.append("rotary_dim")
    for key in own:
        notes.append(
            f"config.json: {key} = {fields[key]!r} is a word of our own; other readers take their "
            "default and compute something else"
        )
    return fields, notes


def _without_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in fields.items() if key != "auto_map"}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = _without_code(text)
    return kept


def _with_dtype(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """With the dtype that was asked for, wherever the config says one."""
    found = {key: name if key in ("dtype", "torch_dtype") else v for key, v in fields.items()}
    text = found.get("text_config")
    if isinstance(text, Mapping):
        found["text_config"] = _with_dtype(text, name)
    return found


def carried_files(folder: Path) -> list[str]:
    """Which files of the closed list the folder has.

    Raises:
      ValueError: one is a link out of the folder, no plain file, or absurdly large.
    """
    found = []
    for name in CARRIED_FILES:
        if not (folder / name).exists() and not (folder / name).is_symlink():
            continue
        path = plain_file(folder, name)
        if not path.exists():
            raise ValueError(f"{path}: is a link to a file that is not there; remove or mend it")
        size = path.stat().st_size
        if not path.is_file() or size > MAX_FILE:
            raise ValueError(
                f"{path}: has {size:,} bytes or is no plain file, and is not carried; remove it"
            )
        found.append(name)
    return found


def written_documents(
    source: Source, fields: Mapping[str, Any], to: To, carried: list[str]
) -> dict[str, bytes]:
    """The files that are made: config.json, and for Hugging Face what the source has not."""
    documents = {CONFIG: _json(fields)}
    if fields == source.fields:  # to the byte
        documents[CONFIG] = read_carried(source.folder, CONFIG)
    if to == "orbax":
        return documents
    if GENERATION not in carried:
        text = fields.get("text_config", fields)
        documents[GENERATION] = _json({k: text.get(k) for k in ("bos_token_id", "eos_token_id")})
    if CARD not in carried:
        documents[CARD] = _card(source, fields, to)
    return documents


def read_carried(folder: Path, name: str) -> bytes:
    """The bytes of a file of the closed list.

    Raises:
      ValueError: it cannot be read.
    """
    with open(open_plain(plain_file(folder, name)), "rb") as file:
        return file.read(MAX_FILE)


def _card(source: Source, fields: Mapping[str, Any], to: To) -> bytes:
    library = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    config = source.config
    return (
        f"{library if to == 'hf' else ''}# {fields['model_type']}\n\n"
        f"Converted with `mmx convert` from a checkpoint of the form `{source.form}`: "
        f"{config.num_layers} layers of width {config.embed_dim}, {config.num_experts} experts, a "
        f"vocabulary of {config.vocab_size:,}.\n\n"
        "Where the weights come from, what they may be used for and how well they do is for their "
        "author to say here.\n"
    ).encode()


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
