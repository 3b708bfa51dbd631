"""Writing pictures as a video."""

from fractions import Fraction

import av
import pytest
import torch

from cpm_rcnn.data.video import Frame, Video
from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.video import VideoWriter

COLORS = torch.tensor([[250, 30, 20], [20, 200, 40], [40, 60, 250]], dtype=torch.uint8)


def frame(number, pts=None, time_base=Fraction(1001, 30000)):
    return Frame("a", number, number if pts is None else pts, time_base, Fraction(30000, 1001))


def picture(number, height=48, width=64):
    return COLORS[number % 3][:, None, None].repeat(1, height, width)


def write(path, frames, pictures):
    writer = VideoWriter(path, frames[0], pictures[0])
    for each, image in zip(frames, pictures):
        writer.write(each, image)
    writer.close()
    with Video(path, "a", "a") as video:
        return list(video.frames(1))


def test_a_video_has_the_rate_the_times_and_the_colors_of_what_was_written(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    read = write(path, [frame(k) for k in range(12)], [picture(k) for k in range(12)])
    assert [place.pts * place.time_base for place, _ in read] == [k * Fraction(1001, 30000) for k in range(12)]
    assert {place.rate for place, _ in read} == {Fraction(30000, 1001)}
    for k, (_, image) in enumerate(read):
        assert (image.float().mean((1, 2)) - COLORS[k % 3].float()).abs().max() < 6
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1  # BT.709, so that players do not guess


def test_frames_that_are_left_out_leave_the_others_at_their_times(tmp_path):
    frames = [frame(k, pts) for k, pts in enumerate([0, 10, 11, 40])]
    read = write(tmp_path / "a.mp4", frames, [picture(k) for k in range(4)])
    assert [place.seconds for place, _ in read] == pytest.approx([pts * 1001 / 30000 for pts in (0, 10, 11, 40)])


def test_sides_of_odd_length_get_one_pixel_more_and_other_sizes_are_scaled(tmp_path):
    pictures = [picture(0, 47, 63), picture(0, 47, 63), picture(0, 94, 126)]
    read = write(tmp_path / "a.mp4", [frame(k) for k in range(3)], pictures)
    assert {tuple(image.shape) for _, image in read} == {(3, 48, 64)}
    for _, image in read:
        assert (image[:, -1, -1] - COLORS[0].float()).abs().max() < 12


def test_times_that_do_not_increase_are_moved(tmp_path):
    read = write(tmp_path / "a.mp4", [frame(k, pts) for k, pts in enumerate([0, 3, 3, 2, 9])], [picture(0)] * 5)
    assert [place.pts * place.time_base for place, _ in read] == [k * Fraction(1001, 30000) for k in (0, 3, 4, 5, 9)]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a").write_text("text")
    with pytest.raises(UserError, match=r"a/b\.mp4: cannot write the video"):
        VideoWriter(tmp_path / "a" / "b.mp4", frame(0), picture(0))
