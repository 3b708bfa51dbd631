"""Writing pictures as a video, by FFmpeg through the optional package ``av``."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cpm_rcnn.data.video import Frame
from cpm_rcnn.errors import UserError

_ENCODER = "libx264"
_BT709 = 1  # the number of this color space, its primaries and its transfer function in the standard ITU-T H.273
_LIMITED_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG


class VideoWriter:
    """Writes an mp4 file, H.264 without sound, whose frames have the times of another video.

    Args:
        path: the file; missing folders are created.
        frame: the first frame, for the frame rate and the unit of time.
        picture: uint8 (3, H, W), a picture of the size of the video. Later ones of another size are scaled. The width
            and the height of the video are even; the last row or column is repeated if necessary.

    Raises:
        UserError: the file cannot be written, or ``av`` has no encoder. The other methods raise it too.
    """

    def __init__(self, path: Path, frame: Frame, picture: Tensor) -> None:
        import av

        self._path = path
        self._last = -1
        height, width = picture.shape[-2:]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(path.absolute()), "w", format="mp4")
            stream: Any = self._container.add_stream(_ENCODER, rate=frame.rate)
        except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: there is no such encoder
            raise UserError(f"{path}: cannot write the video ({error})") from error
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = frame.time_base
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        self._stream = stream

    def write(self, frame: Frame, picture: Tensor) -> None:
        """Add a picture, uint8 (3, H, W) on the CPU, at the time of ``frame``."""
        import av

        height, width = picture.shape[-2:]
        pixels = np.pad(picture.permute(1, 2, 0).numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
            self._stream.width, self._stream.height, "yuv420p", dst_colorspace="ITU709"
        )
        self._last = max(frame.pts, self._last + 1)  # the times of some videos do not increase
        encoded.pts, encoded.time_base = self._last, frame.time_base
        self._encode(encoded)

    def close(self) -> None:
        """Write what the encoder still has, and close the file."""
        try:
            self._encode(None)
        finally:
            self._container.close()

    def _encode(self, frame: Any) -> None:
        import av

        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except av.FFmpegError as error:
            raise UserError(f"{self._path}: cannot write the video ({error.strerror})") from error
