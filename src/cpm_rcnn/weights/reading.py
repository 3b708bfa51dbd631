"""Read weight files of any origin without executing code in them, and compare their names and shapes."""

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

# The keys under which Lightning, most other programs and Caffe2 store the weights.
_WRAPPERS = ("state_dict", "model", "blobs")
# Maximum number of names of each kind in an error.
_LISTED = 6
# All names that pickles of numpy arrays refer to, before and since numpy 2.0.
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
# What training checkpoints of the CPM R-CNN release contain in addition to weights: numbers, and the settings of its
# solver,
# which are read as a plain mapping.
_INERT: list[Any] = [
    (OrderedDict, "pet.utils.collections.AttrDict"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]


def read_weights(path: str | Path, argument: str) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Reads ``torch.save`` files (bare, or under ``state_dict`` or ``model``), ``.safetensors``, and ``.pkl`` files of
    numpy arrays (detectron2's, Caffe2's). Nothing in a file is executed: a pickle may refer to tensors and arrays only.

    Args:
        path: the file.
        argument: name of the argument that ``path`` comes from, for messages.

    Returns:
        Tensors on the CPU. A prefix ``module.`` that all names share is removed.

    Raises:
        UserError: the file does not exist, is damaged, refers to code, or contains something other than named tensors.
    """
    return named_tensors(read_file(path, argument), f"{argument}={path}")


def read_file(path: str | Path, argument: str) -> Any:
    """The content of a weight file or checkpoint: tensors and plain values.

    Args:
        path: a ``torch.save`` file, ``.safetensors``, or a ``.pkl`` of numpy arrays.
        argument: name of the argument that ``path`` comes from, for messages.

    Raises:
        UserError: the file does not exist, is damaged, or refers to code.
    """
    file, source = check_file(argument, path), f"{argument}={path}"
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
        # torch's message is long; only the name that the pickle refers to is reported.
        asked = re.search(r"GLOBAL (\S+) was not", str(error)) or re.search(r"refers to (\S+)", str(error))
        if asked and not asked[1].startswith("torch."):  # an unknown name of torch itself means a truncated file
            raise UserError(
                f"{source}: refused, it refers to the code {asked[1]}; a weight file may contain tensors only"
            ) from None
        why = type(error).__name__
    except zipfile.BadZipFile as error:
        why = str(error)
    except Exception as error:  # each format has errors of its own
        why = getattr(error, "strerror", None) or type(error).__name__
    raise UserError(f"{source}: cannot be read as weights ({why}); it is damaged or not a weight file")


def named_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a file's content, by name.

    Args:
        content: a mapping from names to tensors or arrays, bare or under ``state_dict``, ``model`` or ``blobs``.
        source: where it came from, for messages.

    Raises:
        UserError: ``content`` is empty or not such a mapping.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{source}: contains {what} instead of named weights")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: contains the key {name!r}; names must be strings")
        tensors[name] = _tensor(value, f"{source}: {name}")
    if all(name.startswith("module.") for name in tensors):  # added by DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _tensor(value: Any, name: str) -> Tensor:
    """A value of a weight file as a tensor."""
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        array = np.array(value)  # a writable copy
        if array.dtype.kind in "fiu" and array.dtype.itemsize <= 8:
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_complex():
        return value
    raise UserError(f"{name} is a {type(value).__name__} without real numbers, not a tensor")


def check_names(source: str, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise :class:`UserError`, listing the differences, unless ``given`` has the names and shapes of ``wanted``."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_LISTED])}{' ..' if len(names) > _LISTED else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems)}")


def _check_archive(file: Path) -> None:
    """Raise BadZipFile for an archive that is truncated or whose members do not match their checksums."""
    with file.open("rb") as stream:
        if stream.read(2) != b"PK":
            return  # written by torch before 1.6, not an archive
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("truncated")
    with zipfile.ZipFile(file) as archive:
        if part := archive.testzip():
            raise zipfile.BadZipFile(f"{part} does not match its checksum")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NUMPY_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refers to {module}.{name}") from None
