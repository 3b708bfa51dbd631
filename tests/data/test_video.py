"""Reading videos frame by frame."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from cpm_rcnn.data.video import Video
from cpm_rcnn.errors import UserError
from video_files import SQUARE, gray_of, write_video

RED = torch.tensor([255.0, 0, 0])


def read(path, stride=1):
    """The frames of a video, and the message of the error with which it ends."""
    frames = []
    with Video(path, path.name, str(path)) as video:
        try:
            for frame in video.frames(stride):
                frames.append(frame)
        except UserError as error:
            return frames, str(error)
    return frames, None


def number_in(image):
    """The number that the gray right half of a frame tells."""
    return round((image[:, :, -20:].float().mean().item() - gray_of(0)) / 3)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "avi"])
def test_all_frames_of_a_video_are_read_in_order(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", 12, rate=Fraction(25))
    frames, problem = read(path)
    assert problem is None
    assert [place.number for place, _ in frames] == list(range(12))
    assert [place.seconds for place, _ in frames] == pytest.approx([k / 25 for k in range(12)], abs=1e-3)
    for k, (place, image) in enumerate(frames):
        assert (place.video, place.rate) == (f"a.{suffix}", 25)
        assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, 64, 96), True)
        assert number_in(image) == k
        assert (image[:, 4:20, 4:20].float().mean((1, 2)) - RED).abs().max() < 12
    with Video(path, "a", "a") as video:
        assert video.expected_frames == 12


def test_a_stride_takes_every_nth_frame_with_its_own_number_and_time(tmp_path):
    frames, _ = read(write_video(tmp_path / "a.mp4", 10, rate=Fraction(30000, 1001)), stride=4)
    assert [(place.number, number_in(image)) for place, image in frames] == [(0, 0), (4, 4), (8, 8)]
    assert [place.pts * place.time_base for place, _ in frames] == [Fraction(1001 * k, 30000) for k in (0, 4, 8)]


def test_frames_keep_their_times_in_videos_without_a_constant_rate(tmp_path):
    times = [0, 1, 5, 6, 20]
    frames, problem = read(write_video(tmp_path / "a.mp4", 5, times=times))
    assert problem is None
    assert [place.seconds for place, _ in frames] == [time / 25 for time in times]


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (-90, (0, 1)), (90, (1, 0)), (180, (1, 1))])
def test_frames_are_turned_upright_as_phones_ask_for(tmp_path, rotation, corner):
    ((_, image), *_), _ = read(write_video(tmp_path / "a.mp4", 2, rotation=rotation))
    assert image.shape == ((3, 64, 96) if rotation in (0, 180) else (3, 96, 64))
    y, x = (-SQUARE + 4 if end else 4 for end in corner)
    square = image[:, y:, x:][:, : SQUARE - 8, : SQUARE - 8].float().mean((1, 2))
    assert (square - RED).abs().max() < 12


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_frames_before_the_end_of_a_truncated_video_are_read(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write_video(tmp_path / f"a.{suffix}", 50, noise=100, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    frames, problem = read(path)
    assert problem is not None
    assert str(path) in problem
    assert "ends early, after 1." in problem or "is damaged after 1." in problem
    assert 20 < len(frames) < 35
    assert [number_in(image) for _, image in frames] == list(range(len(frames)))


def test_the_frames_before_a_damaged_part_are_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", 50, noise=100, options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    start = len(content) * 6 // 10
    content[start : start + 4000] = bytes(4000)
    path.write_bytes(content)
    frames, problem = read(path)
    assert problem is not None
    assert "is damaged after 1." in problem
    assert 20 < len(frames) < 40
    assert [number_in(image) for _, image in frames] == list(range(len(frames)))


def test_a_video_is_not_decoded_ahead_of_the_frames_that_are_used(tmp_path):
    path = write_video(tmp_path / "a.mp4", 70, size=(32, 64))
    with Video(path, "a", "a") as video:
        frames = video.frames(1)
        next(frames)
        demuxed = video._container.demux(video._stream)
        assert sum(packet.size > 0 for packet in demuxed) > 35


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged or not a video in a supported format"),
        (b"text", "is damaged or not a video in a supported format"),
        # A playlist, which names other files.
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nb.ts\n#EXT-X-ENDLIST\n", "is damaged or not a video"),
        (b"ffconcat version 1.0\nfile b.ts\n", "is damaged or not a video"),
    ],
)
def test_a_file_that_is_not_a_video_is_refused(tmp_path, content, problem):
    write_video(tmp_path / "b.ts", 3)
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.mp4 {problem}"):
        Video(path, path.name, str(path))


def test_a_title_in_any_encoding_does_not_matter(tmp_path):
    path = write_video(tmp_path / "a.mkv", 3, title="caf__")
    path.write_bytes(path.read_bytes().replace(b"caf__", b"caf\xe9!"))
    frames, problem = read(path)
    assert (len(frames), problem) == (3, None)


def test_an_unknown_codec_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mkv", 3)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_NEW/NOT/KNOWN"))
    with pytest.raises(UserError, match=r"a\.mkv has an unknown video codec"):
        Video(path, path.name, str(path))


def test_a_video_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(UserError, match=r"a\.mp4 has no video stream"):
        Video(tmp_path / "a.mp4", "a.mp4", str(tmp_path / "a.mp4"))


def test_a_missing_video_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"none\.mp4 .*No such file"):
        Video(tmp_path / "none.mp4", "none.mp4", str(tmp_path / "none.mp4"))
