"""Detectors of other programs: recognition of the program that wrote a file, and conversion to this project's model."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from cpm_rcnn.errors import UserError
from cpm_rcnn.weights import detectron2, mmdetection, release, torchvision
from cpm_rcnn.weights.detector_files import ConvertedDetector, DetectorFile
from cpm_rcnn.weights.reading import check_published_name, named_tensors, read_file

_LISTED = 3


class Reader(NamedTuple):
    """The reader of one program's files.

    Attributes:
        origin: the program.
        recognizes: whether a file with the given parameter names comes from it.
        read: the converted detector; called with a :class:`DetectorFile` and options that replace those of the file.
    """

    origin: str
    recognizes: Callable[[Collection[str]], bool]
    read: Callable[..., ConvertedDetector]


# To add another program, write a module with these two functions.
READERS = (
    Reader("the CPM R-CNN release", release.recognizes, release.read),
    Reader("detectron2", detectron2.recognizes, detectron2.read),
    Reader("mmdetection", mmdetection.recognizes, mmdetection.read),
    Reader("torchvision", torchvision.recognizes, torchvision.read),
)


def convert_file(path: Any, argument: str, **options: Any) -> ConvertedDetector:
    """The detector of a file that another program wrote.

    Args:
        path: the file, or ``torchvision:NAME`` for weights that torchvision downloads.
        argument: name of the argument that ``path`` comes from, for messages.
        **options: ``input_format`` of the backbone, ``norm_epsilon`` (torchvision only), and options of the model,
            which replace those derived from the file.

    Raises:
        ArgumentError: an option is invalid.
        UserError: the file does not exist, is damaged, refers to code, or is of no known program or kind of model.
    """
    converted = convert_download(path, f"{argument}={path}", **options)
    return converted or convert_content(read_file(path, argument), path, argument, **options)


def convert_download(name: Any, source: str, **options: Any) -> ConvertedDetector | None:
    """The detector that ``torchvision:NAME`` means; None if ``name`` is something else.

    Args:
        name: the name, or a path.
        source: the argument and its value, for messages.
        **options: see :func:`convert_file`.

    Raises:
        UserError: the name is unknown, or the file cannot be downloaded.
    """
    if not torchvision.downloads(name):
        return None
    return torchvision.read(DetectorFile(torchvision.download(name, source), None, source), **options)


def convert_content(content: Any, path: Any, argument: str, **options: Any) -> ConvertedDetector:
    """The detector of a file whose content was read with :func:`~cpm_rcnn.weights.reading.read_file`.

    Args:
        content: content of the file.
        path: the file.
        argument: name of the argument that ``path`` comes from, for messages.
        **options: see :func:`convert_file`.

    Raises:
        ArgumentError: an option is invalid.
        UserError: the file is damaged, or of no known program or kind of model.
    """
    source = f"{argument}={path}"
    check_published_name(path, argument)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    state = named_tensors(content, source)
    for reader in READERS:
        if reader.recognizes(state):
            return reader.read(DetectorFile(state, meta, source), **options)
    if any(name.startswith("model.backbone.") for name in state):
        raise UserError(f"{source}: is a checkpoint of this project already")
    origins = ", ".join(reader.origin for reader in READERS)
    raise UserError(
        f"{source}: not a detector of {origins}; its parameters are named {', '.join(list(state)[:_LISTED])}, .."
    )
