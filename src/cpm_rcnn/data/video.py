"""Frames of video files, decoded by FFmpeg through the optional package ``av``."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cpm_rcnn.errors import UserError

# Names of FFmpeg's demuxers, each with all its aliases. The others are not tried: some of them are playlists, which
# name other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg"
# A video has ended early if more than this is missing: seconds, and a part of its duration.
_MISSING_SECONDS, _MISSING_PART = 0.5, 0.05


@dataclass(frozen=True)
class Frame:
    """The place of a frame in its video.

    Attributes:
        video: name of the video.
        number: its number in the video, from 0. Frames that are not used are counted.
        pts: its time from the start of the video in units of ``time_base``.
        time_base: seconds.
        rate: frames of the video per second, on average.
    """

    video: str
    number: int
    pts: int
    time_base: Fraction
    rate: Fraction

    @property
    def seconds(self) -> float:
        """The time at which it is shown."""
        return float(self.pts * self.time_base)


class Video:
    """A video file, which is decoded frame by frame. It is a context manager, which closes the file.

    Args:
        path: the file.
        name: its name in :class:`Frame`.
        label: its name in messages.

    Raises:
        UserError: it is damaged, has another format or an unknown codec, or has no pictures.
    """

    def __init__(self, path: Path, name: str, label: str) -> None:
        import av

        self._name, self._label = name, label
        try:
            # An absolute path, because FFmpeg takes what is in front of a colon for a protocol.
            # Titles and comments may have any encoding.
            self._container = av.open(
                str(path.absolute()), options={"format_whitelist": _FORMATS}, metadata_errors="replace"
            )
        except (av.FFmpegError, OSError) as error:
            reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
            raise UserError(f"{label} is damaged or not a video in a supported format{reason}") from error
        stream: Any = self._container.streams.best("video")
        if stream is None or stream.codec_context is None:
            self._container.close()
            raise UserError(f"{label} has {'no video stream' if stream is None else 'an unknown video codec'}")
        stream.thread_type = "AUTO"
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def rate(self) -> Fraction:
        """Frames per second, on average."""
        return self._stream.average_rate or self._stream.guessed_rate or Fraction(25)

    @property
    def expected_frames(self) -> int | None:
        """The number of frames that the file states or its duration suggests; None if it says neither."""
        if self._stream.frames:
            return self._stream.frames
        duration = self._duration()
        return round(duration * self.rate) if duration else None

    def frames(self, stride: int) -> Iterator[tuple[Frame, Tensor]]:
        """Decode the video.

        Args:
            stride: every ``stride``-th frame is returned, from the first one.

        Returns:
            Each frame's place, and its pixels, uint8 RGB (3, H, W). It is rotated as the file says, by quarter turns.

        Raises:
            UserError: the video is damaged or ends early. All frames before have been returned.
        """
        for number, decoded in enumerate(self._decoded()):
            if number % stride == 0:
                yield self._frame(decoded, number), _pixels(decoded)

    def _decoded(self) -> Iterator[Any]:
        """All frames of ``av``."""
        import av

        failure, end = None, Fraction(0)
        start = Fraction(self._container.start_time or 0, av.time_base)
        try:
            # Of all streams, because the duration is that of the longest one.
            for packet in self._container.demux():
                if packet.pts is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base - start)
                if packet.stream.index == self._stream.index:
                    yield from packet.decode()
        except av.FFmpegError as error:
            failure = error
        if failure is not None:
            with suppress(av.FFmpegError):
                yield from self._stream.codec_context.decode(None)  # frames that wait for their turn
            raise UserError(f"{self._label} is damaged after {float(end):.1f} seconds") from failure
        duration = self._duration()
        if duration is not None and duration - end > max(_MISSING_SECONDS, _MISSING_PART * duration):
            raise UserError(f"{self._label} ends early, after {float(end):.1f} of {float(duration):.1f} seconds")

    def _duration(self) -> Fraction | None:
        """The duration of the longest stream in seconds, as the file states it."""
        import av

        return None if self._container.duration is None else Fraction(self._container.duration, av.time_base)

    def _frame(self, decoded: Any, number: int) -> Frame:
        if decoded.pts is None or not decoded.time_base:
            return Frame(self._name, number, number, 1 / self.rate, self.rate)
        pts = decoded.pts - (self._stream.start_time or 0)
        return Frame(self._name, number, pts, decoded.time_base, self.rate)


def _pixels(decoded: Any) -> Tensor:
    """The upright image (3, H, W) uint8 of a frame of ``av``."""
    image = torch.from_numpy(decoded.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(image, round(decoded.rotation / 90), (1, 2)).contiguous()
