"""Weight files of any origin: read without running what is in them, and compared name by name."""

import codecs
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpm_rcnn.errors import UserError, check_file

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
# What training checkpoints of the release hold beside weights: its solver's settings, read as a plain mapping, and
# numbers.
_INERT: list[Any] = [
    (OrderedDict, "pet.utils.collections.AttrDict"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]


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
    return named_tensors(read_file(path, key), f"{key}={path}")


def read_file(path: str | Path, key: str) -> Any:
    """What a weight file or checkpoint holds: tensors and plain values, nothing that runs.

    Args:
        path: a ``torch.save`` file, ``.safetensors``, or a ``.pkl`` of numpy arrays.
        key: the config key that named it, for messages.

    Raises:
        UserError: no such file; damaged; asks to run code.
    """
    file, source = check_file(key, path), f"{key}={path}"
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if file.suffix == ".pkl":
            with file.open("rb") as stream:
                return _ArrayUnpickler(stream, encoding="latin1").load()
        _check_archive(file)
        with torch.serialization.safe_globals(_INERT):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what the pickle wanted to import within a long advice.
        asked = re.search(r"GLOBAL (\S+) was not", str(error)) or re.search(r"asks for (\S+)", str(error))
        if asked and not asked[1].startswith("torch."):  # a name of torch's own that is not known is cut short
            raise UserError(f"{source}: refused, it asks to run {asked[1]}; weights are tensors alone") from None
        why = type(error).__name__
    except zipfile.BadZipFile as error:
        why = str(error)
    except Exception as error:  # each format has errors of its own
        why = getattr(error, "strerror", None) or type(error).__name__
    raise UserError(f"{source}: cannot be read as weights ({why}); damaged, or no weight file")


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
        if not isinstance(name, str):
            raise UserError(f"{source}: holds {name!r} where names should stand")
        tensors[name] = _tensor(value, f"{source}: {name}")
    if all(name.startswith("module.") for name in tensors):  # left by torch's DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _tensor(value: Any, name: str) -> Tensor:
    """A value of a weight file as a tensor that holds its numbers."""
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        array = np.array(value)  # a copy that can be written to
        if array.dtype.kind in "fiu" and array.dtype.itemsize <= 8:
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_complex():
        return value
    raise UserError(f"{name} is a {type(value).__name__} that holds no real numbers, not a tensor of weights")


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


def _check_archive(file: Path) -> None:
    """Raise BadZipFile for an archive that is cut short or whose parts do not match their checksums."""
    with file.open("rb") as stream:
        if stream.read(2) != b"PK":
            return  # torch's files of before 2020
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("cut short")
    with zipfile.ZipFile(file) as archive:
        if part := archive.testzip():
            raise zipfile.BadZipFile(f"{part} does not match its checksum")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NUMPY_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}") from None
