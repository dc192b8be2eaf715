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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this a checkpoint folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
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
    """The tensors of a checkpoint folder, single file or sharded; a context manager.

    Raises:
      ValueError: a shard is missing, truncated or outside the folder, an index that disagrees with
        the files, or no safetensors at all.
    """

    def __init__(self, folder: Path):
        self._handles: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = _weight_map(folder)
        try:
            for name in sorted(set(weight_map.values())):
                self._open(_inside(folder, name))
            self._check_index(folder, weight_map)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        self._handles.clear()

    def read(self, key: str, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that these leading indices select."""
        info = self.tensors[key]
        handle = self._handles[info.file]
        try:
            return handle.get_slice(key)[part] if part else handle.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{info.file}: {key} cannot be read ({error})") from None

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file}: shard is missing; download it again")
        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({error}); download it again"
            ) from None
        self._handles[file] = handle
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            if key in self.tensors:
                raise ValueError(f"{file}: {key} is also in {self.tensors[key].file.name}")
            part = handle.get_slice(key)
            self.tensors[key] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())

    def _check_index(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        if set(weight_map) == {SINGLE}:
            return
        for key, name in weight_map.items():
            info = self.tensors.get(key)
            if info is None or info.file.name != name:
                raise ValueError(
                    f"{folder / INDEX}: {key} should be in {name}, and is not; download it again"
                )


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name; {SINGLE: SINGLE} for a folder with one file and no index."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
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
    raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder; refuses every way out of it.

    A link is followed within the folder, or to `blobs`, where the Hugging Face cache keeps the
    files of its snapshots.
    """
    file = folder / name
    if Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{folder / INDEX}: weight_map names {name!r}, which is not in the folder")
    if file.is_symlink():
        home = folder.resolve()
        allowed = (home, home.parent.parent / "blobs")
        if file.resolve().parent not in allowed:
            raise ValueError(f"{file}: is a link out of the folder; put the file itself there")
    return file
