"""Small videos, drawn frame by frame."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BACKGROUND = 60
SQUARE = 24


def gray_of(number: int) -> int:
    """The gray value of the right half of a frame."""
    return 40 + 3 * number


def pixels(number: int, size: tuple[int, int]) -> np.ndarray:
    """A frame (height, width, 3) with a red square at the upper left, and a gray right half that tells its number."""
    frame = np.full((*size, 3), BACKGROUND, np.uint8)
    frame[:, size[1] // 2 :] = gray_of(number)
    frame[:SQUARE, :SQUARE] = (255, 0, 0)
    return frame


def write_video(
    path: Path,
    count: int = 10,
    size: tuple[int, int] = (64, 96),
    rate: Fraction = Fraction(25),
    times: list[int] | None = None,
    rotation: int = 0,
    noise: int = 0,
    options: dict[str, str] | None = None,
    title: str = "",
) -> Path:
    """Write a video in the format of the suffix.

    Args:
        path: the file.
        count: number of frames.
        size: (height, width) of the frames.
        rate: frames per second.
        times: time of each frame in units of 1 / ``rate``; None: 0, 1, 2, ...
        rotation: angle in degrees, counterclockwise, by which players turn the frames.
        noise: largest noise in the left half, below the square, which makes the file larger.
        options: of FFmpeg's muxer.
        title: title of the video.
    """
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        container.metadata["title"] = title
        # In avi files, frames that wait for later ones have wrong times.
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 5, 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            frame = pixels(number, size)
            area = frame[SQUARE:, : size[1] // 2]
            area += random.integers(0, noise + 1, area.shape, dtype=np.uint8)
            encoded = av.VideoFrame.from_ndarray(frame, format="rgb24")
            encoded.pts, encoded.time_base = number if times is None else times[number], 1 / rate
            container.mux(stream.encode(encoded))
        container.mux(stream.encode(None))
    return path
