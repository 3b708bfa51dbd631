"""Images with more channels than RGB and alpha, or with a part of the 16-bit range, are refused in one line."""

import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.errors import UserError

GRAY, RGB, CMYK = 1, 2, 5
UNSPECIFIED, ALPHA = 0, 2


def tiff(pixels, color, extra=(), planar=False):
    """An uncompressed TIFF of ``pixels`` (H, W, channels)."""
    height, width, channels = pixels.shape
    data = (np.moveaxis(pixels, 2, 0) if planar else pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    short, long = 3, 4
    tags = [
        *((256, short, [width]), (257, short, [height]), (258, short, [8 * pixels.dtype.itemsize] * channels)),
        *((259, short, [1]), (262, short, [color]), (273, long, [8]), (277, short, [channels])),
        *((278, long, [height]), (279, long, [len(data)]), (284, short, [2 if planar else 1])),
        *([(338, short, list(extra))] if extra else []),
    ]
    start = 8 + len(data)
    after, entries = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == short else 'I'}", *values)
        if len(packed) > 4:
            offset = start + 2 + 12 * len(tags) + 4 + len(after)
            after, packed = after + packed, struct.pack("<I", offset)
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + after


def pixels(channels, dtype=np.uint8):
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (20, 30, channels)).astype(dtype)


REFUSED = {
    "RGB and infrared": (tiff(pixels(4), RGB, [UNSPECIFIED]), 4),
    "16 bits": (tiff(pixels(4, np.uint16), RGB, [UNSPECIFIED]), 4),
    "planes": (tiff(pixels(4), RGB, [UNSPECIFIED], planar=True), 4),
    "RGB and two": (tiff(pixels(5), RGB, [UNSPECIFIED, ALPHA]), 5),
    "two gray": (tiff(pixels(2), GRAY, [UNSPECIFIED]), 2),
    "five gray": (tiff(pixels(5), GRAY, [UNSPECIFIED] * 4), 5),
    "eight of 16 bits": (tiff(pixels(8, np.uint16), GRAY, [UNSPECIFIED] * 7), 8),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tiff_with_more_channels_is_refused_when_its_header_or_pixels_are_read(tmp_path, case):
    raw, channels = REFUSED[case]
    (tmp_path / "a.tif").write_bytes(raw)
    expected = f"a.tif has {channels} channels; only gray and RGB are supported: save the channels to use as RGB"
    source = ImageSource(tmp_path)
    with pytest.raises(UserError) as error:
        source.read("a.tif")
    assert str(error.value) == f"{tmp_path}: {expected}"
    assert source.header_problem("a.tif", (20, 30)) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (tiff(pixels(3), RGB), pixels(3)),
        (tiff(pixels(3, np.uint16), RGB), pixels(3, np.uint16) >> 8),
        (tiff(pixels(4), RGB, [ALPHA]), pixels(4)[..., :3]),
        (tiff(pixels(4), RGB), pixels(4)[..., :3]),
        (tiff(pixels(1), GRAY), pixels(1).repeat(3, axis=2)),
        (tiff(pixels(4), CMYK), None),
    ],
    ids=["RGB", "16 bits", "alpha", "fourth of no kind", "gray", "CMYK"],
)
def test_a_tiff_of_gray_rgb_or_cmyk_with_or_without_alpha_is_read(tmp_path, raw, expected):
    (tmp_path / "a.tif").write_bytes(raw)
    image = ImageSource(tmp_path).read("a.tif")
    assert image.shape == (3, 20, 30)
    assert expected is None or torch.equal(image, torch.from_numpy(expected.astype(np.uint8)).permute(2, 0, 1))


def test_16_bit_gray_that_uses_12_bits_is_refused_and_black_is_not(tmp_path):
    for name, largest in (("dark.png", 4095), ("black.png", 0), ("bright.png", 4096)):
        Image.fromarray(np.linspace(0, largest, 600).reshape(20, 30).astype(np.uint16)).save(tmp_path / name)
    source = ImageSource(tmp_path)
    with pytest.raises(UserError, match=r"dark\.png has 16 bits per channel, but values up to 4095 only, which"):
        source.read("dark.png")
    assert source.read("black.png").max() == 0
    assert source.read("bright.png").max() == 16


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_opened_without_decoding_them(tmp_path, zipped):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(folder / "plain.png")
    raw = (folder / "plain.png").read_bytes()
    (folder / "short.png").write_bytes(raw[: len(raw) // 2])
    (folder / "text.png").write_bytes(b"text")
    if zipped:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
    source = ImageSource(tmp_path / "images.zip" if zipped else folder)
    with source.opened("plain.png") as (image, transpose):
        assert (image.size, transpose) == ((30, 20), None)
    with source.opened("turned.jpg") as (image, transpose):
        assert image.transpose(transpose).size == (20, 30)
    for name, problem in (("none.png", "not found"), ("text.png", "is damaged"), ("short.png", "is damaged")):
        with (
            pytest.raises(UserError, match=rf"^{source.path}: (image )?{name} {problem}"),
            source.opened(name) as (image, _),
        ):
            image.load()
