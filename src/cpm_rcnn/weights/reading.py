"""Read weight files of any origin without executing code in them, and compare their names and shapes."""

import codecs
import hashlib
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

from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.files import local_file
from cpm_rcnn.remote.urls import location

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
# Packages whose objects training checkpoints contain in addition to weights: settings, log histories, and the like.
_INERT_PACKAGES = ("pet", "mmengine", "mmcv", "mmdet", "addict")
# Numbers and arrays in such objects.
_NUMBERS: list[Any] = [
    *((value, f"{module}.{name}") for (module, name), value in _NUMPY_GLOBALS.items()),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]
# Maximum number of different inert objects in a file; a file is read once more for each.
_MOST_INERT = 32


class InertObject:
    """An object of a class that this project does not have, read from a file as plain data.

    Attributes:
        arguments: what the file passes to the class.
        state: the attributes that the file stores for it.
    """

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "InertObject":
        item = super().__new__(cls)
        item.arguments, item.state = arguments, None
        return item

    def __init__(self, *arguments: Any) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _no_attribute(*_: Any) -> None:
    """Takes the place of ``getattr``, with which pickles refer to the methods of an inert class."""


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
        path: a ``torch.save`` file, ``.safetensors``, or a ``.pkl`` of numpy arrays; a path or a URL.
        argument: name of the argument that ``path`` comes from, for messages.

    Raises:
        UserError: the file does not exist, is damaged, or refers to code.
        UnavailableError: the server of a remote file refuses or does not answer.
    """
    file, source = local_file(argument, path), f"{argument}={path}"
    suffix = location(str(path)).suffix  # a copy of a remote file has none
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if suffix == ".pkl":
            with file.open("rb") as stream:
                return _ArrayUnpickler(stream, encoding="latin1").load()
        _check_archive(file)
        return _load_inert(file)
    except pickle.UnpicklingError as error:
        name = _refused_name(error)
        if name and not name.startswith("torch."):  # an unknown name of torch itself means a truncated file
            raise UserError(
                f"{source}: refused, it refers to the code {name}; a weight file may contain tensors only"
            ) from None
        why = type(error).__name__
    except zipfile.BadZipFile as error:
        why = str(error)
    except Exception as error:  # each format has errors of its own
        why = getattr(error, "strerror", None) or type(error).__name__
    raise UserError(f"{source}: cannot be read as weights ({why}); it is damaged or not a weight file")


def _load_inert(file: Path) -> Any:
    """The content of a ``torch.save`` file, with objects of :data:`_INERT_PACKAGES` as inert data.

    The packages are neither imported nor needed. torch has a list of allowed names, without patterns, so the file is
    read again whenever it refers to a new one.
    """
    allowed: dict[str, Any] = {}
    while True:
        try:
            with torch.serialization.safe_globals([*_NUMBERS, *((value, name) for name, value in allowed.items())]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = _refused_name(error)
            if name == "getattr":
                name, stand_in = "builtins.getattr", _no_attribute
            elif name and name.partition(".")[0] in _INERT_PACKAGES:
                stand_in = OrderedDict if name.endswith("Dict") else InertObject  # type: ignore[assignment]
            else:
                raise
            if name in allowed or len(allowed) == _MOST_INERT:
                raise
            allowed[name] = stand_in


def _refused_name(error: pickle.UnpicklingError) -> str | None:
    """The name in a pickle that a restricted unpickler has refused, from its error, whose message is long."""
    found = re.search(r"GLOBAL (\S+) was not", str(error)) or re.search(r"refers to (\S+)", str(error))
    return found[1] if found else None


def check_published_name(path: str | Path, argument: str) -> None:
    """Compare a file with the checksum in its name.

    torchvision and mmdetection publish files as ``NAME-XXXXXXXX.pth``, where X are the first digits of the file's
    SHA-256. Files in torch's old format have no other checksum.

    Args:
        path: the file.
        argument: name of the argument that ``path`` comes from, for messages.

    Raises:
        UserError: the checksums differ.
    """
    stated = re.search(r"-([0-9a-f]{8})\.pth$", str(path))
    if not stated:
        return
    with local_file(argument, path).open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if not actual.startswith(stated[1]):
        raise UserError(
            f"{argument}={path}: damaged, its SHA-256 begins with {actual[:8]} and not as its name states; rename it "
            "if the name is not its publisher's"
        )


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
