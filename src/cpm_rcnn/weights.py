"""Weight files of any origin: read without running what is in them, and compared name by name."""

import codecs
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpm_rcnn.errors import UserError

# Where the formats of the field keep the weights: Lightning, most others, Caffe2.
_WRAPPERS = ("state_dict", "model", "blobs")
_LISTED = 6
# All that pickles of numpy arrays ask for, in the words of numpy before and since 2.0.
_RECONSTRUCT, _SCALAR = np.zeros(0).__reduce__()[0], np.float32(0).__reduce__()[0]
_NUMPY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("numpy._core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("_codecs", "encode"): codecs.encode,
}


def read_weights(path: str | Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Reads ``torch.save`` files (bare, or under ``state_dict`` or ``model``), ``.safetensors``, and ``.pkl`` files of
    numpy arrays (detectron2's, Caffe2's). Nothing in a file is executed: a pickle may ask for tensors and arrays alone.

    Args:
        path: the file.
        key: the config key that named it, for messages.

    Returns:
        Tensors on the CPU, a ``module.`` before all names taken off.

    Raises:
        UserError: no such file; damaged; asks to run code; holds something other than named tensors.
    """
    path = Path(path).expanduser()
    source = f"{key}={path}"
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    return named_tensors(_read(path, source), source)


def named_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a file's content, by name.

    Args:
        content: a mapping of names to tensors or arrays, bare or under ``state_dict``, ``model`` or ``blobs``.
        source: where it came from, for messages.

    Raises:
        UserError: it is something else, or empty.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{source}: holds {what}, not weights by name")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiu":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source}: {name} is a {type(value).__name__}, not a tensor")
        tensors[name] = value
    if all(name.startswith("module.") for name in tensors):  # left by torch's DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def check_names(source: str, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise :class:`UserError` unless ``given`` has just the names and shapes of ``wanted``; it lists what differs."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_LISTED])}{' ..' if len(names) > _LISTED else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"{source}: does not fit the model; {'; '.join(problems)}")


def _read(path: Path, source: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what the pickle wanted to import within a long advice.
        asked = re.search(r"GLOBAL (\S+) was not", str(error)) or re.search(r"asks for (\S+)", str(error))
        if asked:
            raise UserError(f"{source}: refused, it asks to run {asked[1]}; weights are tensors alone") from None
        raise UserError(
            f"{source}: cannot be read as weights ({type(error).__name__}); damaged, or no weight file"
        ) from None
    except Exception as error:  # each format has errors of its own
        cut = path.read_bytes()[:2] == b"PK" and not zipfile.is_zipfile(path)
        why = "cut short" if cut else type(error).__name__
        raise UserError(f"{source}: cannot be read as weights ({why}); damaged, or no weight file") from None


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NUMPY_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}") from None
