"""A folder of safetensors files, read by name: validated before any data is touched.

Nothing is unpickled, no code in the folder is run, and no file outside it is opened.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUPPORTED_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_NAME = 255  # characters of a file name


def printable(text: str) -> str:
    """A name out of a checkpoint as one line that cannot move the cursor."""
    return text if text.isprintable() else ascii(text)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of this name in the folder.

    Raises:
      ValueError: the file is missing, is a link out of the folder, is not JSON, or holds something
        else than an object.
    """
    path = _inside(folder, name)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this a checkpoint folder?") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested or long beyond use
        reason = printable(str(error))
        raise ValueError(f"{path}: not valid JSON ({reason}); download it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds a JSON {type(fields).__name__}; an object is wanted")
    return fields


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """The tensors of a checkpoint folder, single file or sharded.

    Raises:
      ValueError: a shard is missing, truncated or outside the folder, an index that disagrees with
        the files, or no safetensors at all.
    """

    def __init__(self, folder: Path):
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = _weight_map(folder)
        for name in sorted(set(weight_map.values())):
            self._read_header(_inside(folder, name))
        self._check_index(folder, weight_map)

    def read(self, key: str, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that these leading indices select."""
        info = self.tensors[key]
        try:
            # Opened for each tensor: a mapped file stays in memory as far as it was read.
            with safetensors.safe_open(info.file, framework="numpy") as handle:
                return handle.get_slice(key)[part] if part else handle.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{info.file}: {printable(key)} cannot be read ({error}); download it again"
            ) from None

    def _read_header(self, file: Path) -> None:
        if not file.is_file():  # a folder, too
            raise ValueError(f"{file}: shard is missing; download it again")
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                parts = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
                found = {
                    key: TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
                    for key, part in parts.items()
                }
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({error}); download it again"
            ) from None
        for key in sorted(found.keys() & self.tensors.keys()):
            raise ValueError(
                f"{file}: {printable(key)} is also in {self.tensors[key].file.name}; "
                "remove one of the two"
            )
        self.tensors |= found

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


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name; {SINGLE: SINGLE} for a folder with one file and no index."""
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        weight_map = read_json(folder, INDEX).get("weight_map")
        strings = isinstance(weight_map, dict) and all(
            isinstance(v, str) for v in weight_map.values()
        )
        if not strings or not weight_map:
            raise ValueError(f"{folder / INDEX}: weight_map must map tensor names to file names")
        return weight_map
    if (folder / SINGLE).exists():
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


def _inside(folder: Path, name: str) -> Path:
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
        except (OSError, RuntimeError):  # a link to itself
            inside = False
        if not inside:
            raise ValueError(f"{file}: is a link out of the folder; put the file itself there")
    return file
