"""A folder of safetensors files, read by name: validated before any data is touched.

Nothing is unpickled, no code in the folder is run, and no file outside it is opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmx.convert.bounded import (
    JsonError,
    parse,
    parse_member,
    parse_string,
    printable,
    read_text,
    skip_space,
    walk_object,
)
from mmx.convert.safetensors_file import Limits, TensorInfo, read_header, read_part

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUPPORTED_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_NAME = 255  # characters of a file name
MAX_JSON = 1 << 20  # bytes of a config, or of what an index says beside the weight map
MAX_INDEX = 16 << 20  # bytes; an index of 100,000 tensors has about 10 MB
MAX_SHARDS = 4096
_NOT_A_FOLDER = "no such file; is this a checkpoint folder?"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of at most `MAX_JSON` bytes from a file of this name in the folder.

    Raises:
      ValueError: the file is missing, too large, no plain file, or a link out of the folder; it is
        not JSON, names a member twice, or holds something else than an object.
    """
    path = plain_file(folder, name)
    text = read_text(path, most=MAX_JSON, missing=_NOT_A_FOLDER)
    try:
        fields = parse(text)
    except JsonError as error:
        raise _not_json(path, error) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds a JSON {type(fields).__name__}; an object is wanted")
    return fields


class SafetensorsFolder:
    """The tensors of a checkpoint folder, single file or sharded: `tensors`, by name.

    Raises:
      ValueError: a shard is missing, damaged or outside the folder, there are more shards or
        tensors than allowed, an index that disagrees with the files, or no safetensors at all.
    """

    def __init__(self, folder: Path, limits: Limits | None = None):
        self.tensors: dict[str, TensorInfo] = {}
        limits = limits or Limits()
        weight_map = _weight_map(folder, limits)
        for name in sorted(set(weight_map.values())):
            self._add(plain_file(folder, name), limits)
        self._check_index(folder, weight_map)

    def read(self, key: str, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that these leading indices select; see `read_part`."""
        return read_part(self.tensors[key], part)

    def _add(self, file: Path, limits: Limits) -> None:
        found, _ = read_header(file, limits)
        for key in sorted(found.keys() & self.tensors.keys()):
            raise ValueError(
                f"{file}: {printable(key)} is also in {self.tensors[key].file.name}; "
                "remove one of the two"
            )
        self.tensors |= found
        if len(self.tensors) > limits.tensors:
            raise ValueError(
                f"{file}: with this file there are more than {limits.tensors:,} tensors; "
                "download the checkpoint again"
            )

    def _check_index(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        if set(weight_map) == {SINGLE}:
            return
        for key, name in weight_map.items():
            info = self.tensors.get(key)
            if info is None or info.file.name != name:
                raise ValueError(
                    f"{folder / INDEX}: {printable(key)} should be in {name}, and is not; "
                    "download both again"
                )


def _weight_map(folder: Path, limits: Limits) -> Mapping[str, str]:
    """Tensor name -> file name; {SINGLE: SINGLE} for a folder with one file and no index."""
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return _read_index(plain_file(folder, INDEX), limits)
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return {SINGLE: SINGLE}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickles:
        raise ValueError(
            f"{folder}: holds {pickles[0]} but no safetensors; pickled weights can run code and "
            "are never opened: convert them to safetensors first"
        )
    raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; download one of them")


def _read_index(path: Path, limits: Limits) -> Mapping[str, str]:
    text = read_text(path, most=MAX_INDEX, missing=_NOT_A_FOLDER)
    mapped: dict[str, str] = {}
    shards: dict[str, str] = {}  # each name once in memory
    wanted = ValueError(f"{path}: weight_map must map tensor names to file names")

    def tensor(name: str, position: int) -> int:
        if text[position : position + 1] != '"':
            raise wanted
        shard, end = parse_string(text, position)
        mapped[name] = shards.setdefault(shard, shard)
        if len(shards) > MAX_SHARDS:
            raise JsonError(f"more than {MAX_SHARDS:,} files")
        return end

    def member(name: str, position: int) -> int:
        if name != "weight_map":
            return parse_member(text, position, most=MAX_JSON, what=printable(name))[1]
        if text[position : position + 1] != "{":
            raise wanted
        return walk_object(text, position, tensor, most=limits.tensors, what="tensors")

    start = skip_space(text, 0)
    try:
        if text[start : start + 1] != "{":
            value, _ = parse_member(text, start, most=MAX_JSON, what="it")
            raise ValueError(f"{path}: holds a JSON {type(value).__name__}; an object is wanted")
        end = walk_object(text, start, member, most=100, what="members")
        if skip_space(text, end) != len(text):
            raise JsonError(f"more text after the end, at character {end}")
    except JsonError as error:
        raise _not_json(path, error) from None
    if not mapped:
        raise wanted
    return mapped


def _not_json(path: Path, error: JsonError) -> ValueError:
    return ValueError(f"{path}: not valid JSON ({printable(str(error))}); download it again")


def plain_file(folder: Path, name: str) -> Path:
    """The file of this name in the folder; refuses every way out of it.

    A link is followed within the folder, or to `blobs`, where the Hugging Face cache keeps the
    files of its snapshots.
    """
    plain = Path(name).name == name and name not in ("", ".", "..") and name.isprintable()
    if not plain or len(name) > MAX_NAME:
        shown = ascii(name[:MAX_NAME])
        raise ValueError(
            f"{folder / INDEX}: weight_map names {shown}; it must name files in the folder"
        )
    file = folder / name
    if file.is_symlink():
        home = folder.resolve()
        allowed = (home, home.parent.parent / "blobs")
        try:
            inside = file.resolve(strict=False).parent in allowed
        except (OSError, RuntimeError):
            raise ValueError(f"{file}: is a link to itself; put the file itself there") from None
        if not inside:
            raise ValueError(f"{file}: is a link out of the folder; put the file itself there")
    return file
