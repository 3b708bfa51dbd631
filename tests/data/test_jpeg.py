import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cpm_rcnn.data import jpeg
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.errors import UserError

ORIENTATION = 0x0112


def picture(width, height, mode="RGB"):
    """A picture with texture and smooth areas."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, **options):
    """The content of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


def by_pillow(raw):
    """(3, H, W) int64 as Pillow decodes it, shown as viewers show it."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).long()


def adobe_ycck():
    """A YCCK file, which Pillow cannot write: a CMYK file whose Adobe segment says so."""
    raw = bytearray(encoded(picture(64, 48, "CMYK")))
    start = raw.index(b"Adobe")
    raw[start + 11] = 2
    return bytes(raw)


def rotated(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(picture(64, 48), exif=exif)


FILES = {
    "4:2:0": encoded(picture(64, 48)),
    "4:2:2": encoded(picture(64, 48), subsampling="4:2:2"),
    "4:4:4": encoded(picture(64, 48), subsampling="4:4:4"),
    "progressive": encoded(picture(64, 48), progressive=True),
    "restart markers": encoded(picture(64, 48), restart_marker_blocks=2),
    "gray": encoded(picture(64, 48, "L")),
    "gray progressive": encoded(picture(64, 48, "L"), progressive=True),
    "RGB not converted": encoded(picture(64, 48), keep_rgb=True),
    "low quality": encoded(picture(64, 48), quality=5),
    "odd 4:2:0": encoded(picture(61, 47)),
    "odd 4:2:2": encoded(picture(61, 47), subsampling="4:2:2"),
    "one pixel": encoded(picture(1, 1)),
    "one row": encoded(picture(301, 1)),
    "one column progressive": encoded(picture(1, 301), progressive=True),
    "comment and profile": encoded(picture(64, 48), comment=b"x" * 60000, icc_profile=b"y" * 200000),
    "bytes after the end": encoded(picture(64, 48)) + b"\0" * 100,
    "CMYK": encoded(picture(64, 48, "CMYK")),
    "YCCK": adobe_ycck(),
    **{f"orientation {number}": rotated(number) for number in range(1, 9)},
}
# Those that Pillow decodes, because they are rotated or not RGB.
LEFT_TO_PILLOW = {"CMYK", "YCCK", *(f"orientation {number}" for number in range(2, 9))}


@pytest.fixture(params=["simplejpeg", "without simplejpeg"])
def decoder(request, monkeypatch):
    """Run a test with and without simplejpeg; returns the sizes of the files that it decoded."""
    decoded = []
    if request.param == "simplejpeg":
        decode = pytest.importorskip("simplejpeg").decode_jpeg
        monkeypatch.setattr(jpeg, "decode_jpeg", lambda raw, *rest: (decode(raw, *rest), decoded.append(len(raw)))[0])
    else:
        monkeypatch.setattr(jpeg, "decode_jpeg", None)
    return decoded


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_pillow_within_one_level(tmp_path, name, decoder):
    raw = FILES[name]
    (tmp_path / "a.jpg").write_bytes(raw)
    image = ImageSource(tmp_path).read("a.jpg")
    expected = by_pillow(raw)
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    assert (image.long() - expected).abs().max() <= 1
    if name in LEFT_TO_PILLOW:
        assert decoder == []


@pytest.mark.parametrize("name", sorted(FILES.keys() - LEFT_TO_PILLOW))
def test_simplejpeg_decodes_what_is_upright_and_rgb_or_gray(tmp_path, name, monkeypatch):
    pytest.importorskip("simplejpeg")
    (tmp_path / "a.jpg").write_bytes(FILES[name])
    # Pillow reads the header only.
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("Pillow decoded the image"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("Pillow decoded the image"))
    assert ImageSource(tmp_path).read("a.jpg").dtype == torch.uint8


@pytest.mark.parametrize("missing", [1, 2, 30])
def test_a_jpeg_without_its_last_bytes_is_the_same_with_each_decoder(tmp_path, missing, decoder, caplog):
    raw = encoded(picture(200, 160))
    (tmp_path / "a.jpg").write_bytes(raw[:-missing])
    image = ImageSource(tmp_path).read("a.jpg", (160, 200))
    (message,) = caplog.messages
    assert "a.jpg ends early; " in message
    assert (image.long() - by_pillow(raw)).ne(0).any(dim=0).float().mean() < 0.05


DAMAGED = {
    "half": (
        lambda raw: raw[: len(raw) // 2],
        r"ends early; \d+\.\d% of its pixels are lost \(at most 5% are allowed\)",
    ),
    "header only": (lambda raw: raw[:300], "is damaged or not an image|ends early"),
    "no table": (lambda raw: raw.replace(b"\xff\xdb", b"\xff\xfe", 1), "is damaged or not an image"),
    "text": (lambda raw: b"version https://git-lfs.github.com/spec/v1", "is damaged or not an image"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_jpeg_gives_the_same_line_with_each_decoder(tmp_path, fault, decoder):
    damage, message = DAMAGED[fault]
    (tmp_path / "a.jpg").write_bytes(damage(encoded(picture(200, 160))))
    with pytest.raises(UserError, match=rf"{tmp_path.name}: a\.jpg ({message})[^\n]*$"):
        ImageSource(tmp_path).read("a.jpg")


def test_damage_that_pillow_accepts_gives_its_pixels(tmp_path):
    raw = bytearray(encoded(picture(200, 160)))
    scan = raw.index(b"\xff\xda")
    read = 0
    for position in range(scan + 200, len(raw) - 200, 97):
        damaged = raw.copy()
        damaged[position] ^= 0x5A
        (tmp_path / "a.jpg").write_bytes(damaged)
        try:
            expected = by_pillow(bytes(damaged))
        except OSError:
            continue
        assert (ImageSource(tmp_path).read("a.jpg").long() - expected).abs().max() <= 1
        read += 1
    assert read > 10


def test_another_size_than_expected_is_refused_without_decoding(tmp_path, decoder):
    (tmp_path / "a.jpg").write_bytes(FILES["4:2:0"])
    with pytest.raises(UserError, match=r"a\.jpg is 64 x 48 pixels, but the annotations say 65 x 48"):
        ImageSource(tmp_path).read("a.jpg", (48, 65))
    assert decoder == []


def test_a_png_with_the_name_of_a_jpeg_is_read(tmp_path, decoder):
    picture(64, 48).save(tmp_path / "a.jpg", "PNG")
    assert torch.equal(ImageSource(tmp_path).read("a.jpg").long(), by_pillow((tmp_path / "a.jpg").read_bytes()))
    assert decoder == []


def test_the_pixels_can_be_changed(tmp_path, decoder):
    (tmp_path / "a.jpg").write_bytes(FILES["4:2:0"])
    image = ImageSource(tmp_path).read("a.jpg")
    image[:] = 7
    assert image.eq(7).all()
    assert (ImageSource(tmp_path).read("a.jpg").long() - by_pillow(FILES["4:2:0"])).abs().max() <= 1


def test_a_decoder_that_finds_another_size_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(jpeg, "decode_jpeg", lambda raw, colors: np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "a.jpg").write_bytes(FILES["4:2:0"])
    assert torch.equal(ImageSource(tmp_path).read("a.jpg").long(), by_pillow(FILES["4:2:0"]))
