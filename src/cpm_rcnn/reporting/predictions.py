"""What ``predict`` writes about each image, one class per kind of output."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from cpm_rcnn.data.source_reader import SourceImage
from cpm_rcnn.data.sources import SourceFile
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import ImageDetections
from cpm_rcnn.reporting.pictures import draw, save, text_size
from cpm_rcnn.reporting.video import VideoWriter


@dataclass(frozen=True)
class OutputOptions:
    """What all kinds of output have in common.

    Attributes:
        folder: the folder of the results.
        class_names: names of the classes 1..C.
        min_scores: C scores. All but :class:`Coco` write only the detections that reach them.
        files: the images and videos.
    """

    folder: Path
    class_names: Sequence[str]
    min_scores: Sequence[float]
    files: Sequence[SourceFile]


class Output(Protocol):
    """Writes the detections of images."""

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """Write the detections of an image.

        Args:
            image: the image.
            found: all its detections.
        """

    def close(self) -> None:
        """Write what is left. It is called once, also after an error."""


class Pictures:
    """Copies of the images with the detections drawn on them, ``images/NAME.png``, and of videos, ``videos/NAME.mp4``.

    They keep the suffix of the original, ``a.jpg.png``, so that no two have the same name.
    """

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        # Of the last video; the frames of a video follow each other.
        self._video: tuple[str, VideoWriter] | None = None
        self._text_size: int | None = None

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """See :class:`Output`."""
        folder, class_names = self._options.folder, self._options.class_names
        found = found.above(self._options.min_scores)
        size = text_size(image.pixels, found.boxes)
        if image.frame is None:
            picture = draw(image.pixels, found.to_dict(), class_names, min_score=0, size=size)
            save(picture, folder / "images" / f"{image.name}.png")
            return
        name = image.frame.video
        if self._video is None or self._video[0] != name:
            self.close()
        # The smallest size of the video so far, so that it does not change from frame to frame.
        self._text_size = size if self._text_size is None else min(size, self._text_size)
        picture = draw(image.pixels, found.to_dict(), class_names, min_score=0, size=self._text_size)
        if self._video is None:
            self._video = name, VideoWriter(folder / "videos" / f"{name}.mp4", image.frame, picture)
        self._video[1].write(image.frame, picture)

    def close(self) -> None:
        """Finish the last video."""
        if self._video is not None:
            video, self._video, self._text_size = self._video[1], None, None
            video.close()


class Coco:
    """All detections in COCO's format of results, ``detections.json``, with ``file_name``.

    Those of a frame also have ``frame``, its number in the video from 0, and ``seconds``, its time.
    """

    def __init__(self, options: OutputOptions) -> None:
        self._path = options.folder / "detections.json"
        with _writing(self._path):
            self._file: IO[str] = self._path.open("w")
            self._file.write("[")
        self._separator = "\n"

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """See :class:`Output`."""
        frame = image.frame
        place = {} if frame is None else {"frame": frame.number, "seconds": round(frame.seconds, 6)}
        with _writing(self._path):
            for row in found.to_coco(image.id):
                self._file.write(self._separator + json.dumps({"file_name": image.name, **row, **place}))
                self._separator = ",\n"

    def close(self) -> None:
        """Finish the file."""
        with _writing(self._path), self._file:
            self._file.write("\n]\n")


class Csv:
    """A table of the detections, ``detections.csv``. With videos, it has the columns ``frame`` and ``seconds``."""

    def __init__(self, options: OutputOptions) -> None:
        self._path, self._min_scores = options.folder / "detections.csv", options.min_scores
        frame = ["frame", "seconds"] if any(file.is_video for file in options.files) else []
        with _writing(self._path):
            # A file name that is not UTF-8 keeps its bytes.
            self._file: IO[str] = self._path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
            self._table = csv.writer(self._file)
            self._table.writerow(["file_name", "class", "score", "x1", "y1", "x2", "y2", *frame])

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """See :class:`Output`."""
        found = found.above(self._min_scores)
        frame = image.frame
        place = [] if frame is None else [str(frame.number), f"{frame.seconds:.6f}"]
        with _writing(self._path):
            for label, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist()):
                self._table.writerow([image.name, label, f"{score:.6g}", *(f"{side:.2f}" for side in box), *place])

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path):
            self._file.close()


class Yolo:
    """YOLO's text files, ``labels/NAME.txt`` without the suffix of the image, and ``classes.txt``.

    A line is the class, counted from 0, the center, width and height of the box as parts of the image's width and
    height, and the score.

    Raises:
        UserError: two images have the same name but for their suffixes.
    """

    def __init__(self, options: OutputOptions) -> None:
        self._folder, self._min_scores = options.folder / "labels", options.min_scores
        names: dict[Path, str] = {}
        for file in options.files:
            if not file.is_video and names.setdefault(self._path(file.name), file.name) != file.name:
                other = names[self._path(file.name)]
                raise UserError(
                    f"{other} and {file.name} would have the same file of labels: rename one, or leave yolo out of "
                    "output"
                )
        classes = options.folder / "classes.txt"
        with _writing(classes):
            classes.write_text("".join(f"{name}\n" for name in options.class_names), encoding="utf-8")

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """See :class:`Output`."""
        found = found.above(self._min_scores)
        height, width = image.pixels.shape[-2:]
        boxes = found.convention.to_xywh(found.boxes)
        boxes = boxes.clone()
        boxes[:, :2] += boxes[:, 2:] / 2
        boxes /= boxes.new_tensor([width, height, width, height])
        lines = [
            f"{label - 1} {' '.join(f'{side:.6f}' for side in box)} {score:.6f}\n"
            for label, box, score in zip(found.labels.tolist(), boxes.tolist(), found.scores.tolist())
        ]
        path = self._path(image.name)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))

    def close(self) -> None:
        """Nothing is left to write."""

    def _path(self, name: str) -> Path:
        return self._folder / Path(name).with_suffix(".txt")


class Crops:
    """The parts of the images inside the boxes, ``crops/CLASS/NAME_1.png``."""

    def __init__(self, options: OutputOptions) -> None:
        self._folder, self._min_scores = options.folder / "crops", options.min_scores

    def add(self, image: SourceImage, found: ImageDetections) -> None:
        """See :class:`Output`."""
        found = found.above(self._min_scores)
        height, width = image.pixels.shape[-2:]
        numbers: Counter[str] = Counter()
        for label, box in zip(found.names, found.boxes.tolist()):
            x1, y1 = (max(0, int(side)) for side in box[:2])
            x2, y2 = (min(limit, int(side) + 1) for side, limit in zip(box[2:], (width, height)))
            if x1 < x2 and y1 < y2:
                folder = label.replace("/", "_")
                folder = folder if folder.strip(".") else f"_{folder}"
                numbers[folder] += 1  # two classes may share a folder
                save(image.pixels[:, y1:y2, x1:x2], self._folder / folder / f"{image.name}_{numbers[folder]}.png")

    def close(self) -> None:
        """Nothing is left to write."""


OUTPUTS: dict[str, Callable[[OutputOptions], Output]] = {
    "pictures": Pictures,
    "coco": Coco,
    "csv": Csv,
    "yolo": Yolo,
    "crops": Crops,
}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a :class:`UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
