"""Reading the images and videos of a source one after the other."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cpm_rcnn.data.images import decode_image
from cpm_rcnn.data.sources import SourceFile
from cpm_rcnn.data.video import Frame, Video
from cpm_rcnn.errors import UnavailableError, UserError
from cpm_rcnn.remote.files import local_copy
from cpm_rcnn.remote.urls import Url

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceImage:
    """An image, or a frame of a video.

    Attributes:
        id: its number, from 1. Images that cannot be read have one too.
        name: name of the image, or of the video followed by the number of the frame, such as ``a.mp4/000123``.
        pixels: uint8 RGB (3, H, W).
        frame: the place of the frame; None if this is an image.
    """

    id: int
    name: str
    pixels: Tensor
    frame: Frame | None = None


class SourceReader:
    """Iterates over images and frames of videos. Only one is in memory at a time.

    Files that cannot be read are reported and skipped. Of a damaged video, the frames before the damage are read.

    Args:
        files: the images and videos.
        video_stride: of a video, every ``video_stride``-th frame is read.

    Attributes:
        position: number of images and frames so far. A file of which nothing can be read counts as one.
        total: the expected ``position`` at the end; None while a video is read that does not say how long it is.
        images: number of images so far.
        frames: number of frames so far.
        skipped: number of files that could not be read, or not to their end.
    """

    def __init__(self, files: Sequence[SourceFile], video_stride: int = 1) -> None:
        self._files = files
        self._stride = video_stride
        self.position = self.images = self.frames = self.skipped = 0
        self.total: int | None = len(files)

    def __iter__(self) -> Iterator[SourceImage]:
        """Read them.

        Raises:
            UserError: there is one file only, and nothing of it can be read.
            UnavailableError: likewise, because its server refuses or does not answer.
        """
        for index, file in enumerate(self._files):
            others = len(self._files) - index - 1
            start = self.position
            try:
                yield from self._video(file, others) if file.is_video else self._image(file)
            except (UserError, UnavailableError) as error:
                partly = self.position > start
                if len(self._files) == 1 and not partly:
                    raise
                self.skipped += 1
                self.position = max(self.position, start + 1)
                _log.warning("%s; %s", error, "the frames before are used" if partly else "skipped")
            self.total = self.position + others

    def _image(self, file: SourceFile) -> Iterator[SourceImage]:
        pixels = decode_image(file.read(), file.label)
        self.position += 1
        self.images += 1
        yield SourceImage(self.position, file.name, pixels)

    def _video(self, file: SourceFile, others: int) -> Iterator[SourceImage]:
        path = local_copy(file.location) if isinstance(file.location, Url) else file.location
        with Video(path, file.name, file.label) as video:
            expected = video.expected_frames
            self.total = None if expected is None else self.position + -(-expected // self._stride) + others
            for frame, pixels in video.frames(self._stride):
                self.position += 1
                self.frames += 1
                yield SourceImage(self.position, f"{file.name}/{frame.number:06d}", pixels, frame)
