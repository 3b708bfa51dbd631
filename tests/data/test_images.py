import io
import multiprocessing
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.errors import UserError


def picture(seed=0, size=(30, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "train2017"
    folder.mkdir()
    picture(1).save(folder / "a.jpg")
    picture(2).save(folder / "b.png")
    return folder


def zipped(folder, prefix):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, prefix + file.name)
    return path


@pytest.mark.parametrize("prefix", ["", "train2017/", "coco/images/train2017/"])
def test_zip_and_folder_give_equal_images(folder, prefix):
    archive = ImageSource(zipped(folder, prefix))
    for name in ("a.jpg", "b.png"):
        image = ImageSource(folder).read(name)
        assert image.shape == (3, 20, 30)
        assert image.dtype == torch.uint8
        assert torch.equal(image, archive.read(name))
    assert torch.equal(image, torch.from_numpy(np.array(picture(2))).permute(2, 0, 1))


def test_zip_is_used_if_the_folder_is_missing(folder):
    path = zipped(folder, "train2017/")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    source = ImageSource(folder)
    assert source.path == path
    assert source.read("a.jpg").shape == (3, 20, 30)


def test_zip_source_reads_after_pickling_and_in_a_forked_process(folder):
    source = ImageSource(zipped(folder, "train2017/"))
    expected = source.read("b.png")
    assert torch.equal(pickle.loads(pickle.dumps(source)).read("b.png"), expected)

    def child(connection):
        parents_handle = source._files._opened[1]
        total = int(source.read("b.png").sum())
        connection.send((total, source._files._opened[1] is parents_handle))

    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    assert here.recv() == (int(expected.sum()), False)
    process.join()


def test_ambiguous_member_is_refused(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "a.jpg", "x/a.jpg")
        archive.write(folder / "a.jpg", "y/a.jpg")
    with pytest.raises(UserError, match=r"train2017\.zip: image a\.jpg is ambiguous: x/a\.jpg or y/a\.jpg"):
        ImageSource(path).read("a.jpg")
    assert ImageSource(path).read("y/a.jpg").shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.png"),
        ("L", "a.jpg"),
        ("LA", "a.png"),
        ("RGBA", "a.png"),
        ("RGBA", "a.webp"),
        ("P", "a.gif"),
        ("P", "a.png"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tif"),
        ("YCbCr", "a.jpg"),
        ("RGB", "a.bmp"),
        ("RGB", "a.ppm"),
        ("RGB", "a.jp2"),
    ],
)
def test_every_color_mode_and_format_becomes_rgb_uint8(tmp_path, mode, name):
    Image.new("RGB", (30, 20), (204, 204, 204)).convert(mode).save(tmp_path / name)
    image = ImageSource(tmp_path).read(name)
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.uint8
    assert (image.float().mean() - 204).abs() < 6  # a palette dithers


def test_16_bit_png_is_scaled_down(tmp_path):
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(tmp_path / "a.png")
    image = ImageSource(tmp_path).read("a.png")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.full((3, 20, 30), 156, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled_over_the_whole_range(tmp_path, name):
    pixels = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    Image.fromarray(pixels).save(tmp_path / name)
    image = ImageSource(tmp_path).read(name)
    assert torch.equal(image, torch.from_numpy(pixels // 256).to(torch.uint8).expand(3, -1, -1))


def test_transparency_is_dropped_and_the_colors_are_kept(tmp_path):
    clear = np.dstack([np.array(picture(1)), np.zeros((20, 30), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "a.png")
    assert torch.equal(ImageSource(tmp_path).read("a.png"), torch.from_numpy(clear[..., :3]).permute(2, 0, 1))


def test_transparent_palette_keeps_its_colors(tmp_path):
    palette = picture(1).quantize(16)
    palette.save(tmp_path / "a.png", transparency=bytes(16))
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(ImageSource(tmp_path).read("a.png"), expected)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_an_animation_is_read(tmp_path, name):
    frames = [Image.new("RGB", (30, 20), (shade,) * 3) for shade in (204, 0, 100)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert (ImageSource(tmp_path).read(name).float() - 204).abs().max() < 3


def oriented(tmp_path, orientation, name="a.png", size=(30, 20)):
    """Save a picture with an EXIF orientation; its pixels as stored and as viewers show them, each (3, H, W) uint8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(orientation, size)
    stored.save(tmp_path / name, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / name))
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in (stored, shown)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_rotated_as_viewers_show_it_if_no_size_is_given(tmp_path, orientation):
    _, shown = oriented(tmp_path, orientation)
    assert torch.equal(ImageSource(tmp_path).read("a.png"), shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_decides_whether_the_image_is_rotated_by_90_degrees(tmp_path, orientation):
    stored, shown = oriented(tmp_path, orientation)
    source = ImageSource(tmp_path)
    assert torch.equal(source.read("a.png", tuple(shown.shape[1:])), shown)
    # A rotation by 180 degrees or a flip keeps the size, which then decides nothing.
    assert torch.equal(source.read("a.png", (20, 30)), stored if orientation >= 5 else shown)


def test_square_image_is_rotated_as_viewers_show_it(tmp_path):
    _, shown = oriented(tmp_path, 6, size=(20, 20))
    assert torch.equal(ImageSource(tmp_path).read("a.png", (20, 20)), shown)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_invalid_orientation_is_ignored(tmp_path, orientation):
    stored, _ = oriented(tmp_path, orientation)
    assert torch.equal(ImageSource(tmp_path).read("a.png"), stored)


def test_damaged_exif_is_ignored(tmp_path):
    picture(1).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert torch.equal(ImageSource(tmp_path).read("a.png"), torch.from_numpy(np.array(picture(1))).permute(2, 0, 1))


@pytest.mark.parametrize("as_zip", [False, True])
def test_file_names_in_any_script_are_found(folder, as_zip):
    names = ["фото.png", "日本 語.png", "🐈\u200d⬛.png", "e\u0301é.png", "a'\"%s{}.png", "x" * 250 + ".png"]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    source = ImageSource(zipped(folder, "train2017/") if as_zip else folder)
    for number, name in enumerate(names):
        assert torch.equal(source.read(name), torch.from_numpy(np.array(picture(number))).permute(2, 0, 1))


def one_line(error):
    return "\n" not in str(error.value)


def test_missing_source_names_its_path(tmp_path):
    with pytest.raises(UserError, match=r"val2017: no such image folder, and no val2017\.zip next to it"):
        ImageSource(tmp_path / "val2017")


def test_broken_archive_is_named(tmp_path):
    (tmp_path / "val2017.zip").write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"val2017\.zip: not a readable zip archive"):
        ImageSource(tmp_path / "val2017.zip")


@pytest.mark.parametrize("as_zip", [False, True])
def test_missing_image_names_file_and_source(folder, as_zip):
    source = ImageSource(zipped(folder, "train2017/") if as_zip else folder)
    with pytest.raises(UserError, match=r"train2017(\.zip)?: image c\.jpg not found") as error:
        source.read("c.jpg")
    assert one_line(error)


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
@pytest.mark.parametrize("size", [0, 10, 400])
def test_truncated_image_names_file_and_source(folder, as_zip, name, size):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:size])
    source = ImageSource(zipped(folder, "train2017/") if as_zip else folder)
    fault = "(is damaged or not an image|ends early)" if size else "is empty, a file of 0 bytes"
    with pytest.raises(UserError, match=rf"train2017(\.zip)?: {name} {fault}") as error:
        source.read(name)
    assert one_line(error)


def test_damaged_archive_member_is_named(folder):
    path = zipped(folder, "")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 0xFF
    path.write_bytes(raw)
    source = ImageSource(path)
    with pytest.raises(UserError, match=r"train2017\.zip: .* cannot be read from the archive"):
        [source.read(name) for name in ("a.jpg", "b.png")]


def jpeg(size=(200, 160), **options):
    """The bytes of a JPEG with some texture, of about 13 kB."""
    coarse = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colors": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [1, 2, 3, 20])
def test_a_jpeg_that_lacks_its_last_bytes_is_read_with_a_warning(folder, as_zip, kind, missing, caplog):
    raw = jpeg(**KINDS[kind])
    (folder / "a.jpg").write_bytes(raw)
    whole = ImageSource(folder).read("a.jpg")
    assert caplog.messages == []
    (folder / "a.jpg").write_bytes(raw[:-missing])
    image = ImageSource(zipped(folder, "") if as_zip else folder).read("a.jpg", (160, 200))
    (message,) = caplog.messages
    assert "a.jpg ends early; " in message
    changed = (image != whole).any(dim=0).float().mean()
    # What is lost is never understated by more than the smoothing at its border.
    lost = float(re.search(r"last ([\d.]+)%", message)[1]) / 100 if missing > 2 else 0
    assert changed <= lost + 0.01
    assert lost <= 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_a_jpeg_that_lacks_more_than_a_small_part_is_refused(folder, kind, share):
    raw = jpeg(**KINDS[kind])
    (folder / "a.jpg").write_bytes(raw[: int(len(raw) * (1 - share))])
    with pytest.raises(
        UserError, match=r"a\.jpg ends early[;,] (\d+\.\d% of its pixels are lost|before the last scan)"
    ):
        ImageSource(folder).read("a.jpg")


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused(folder):
    raw = jpeg(progressive=True)
    (folder / "a.jpg").write_bytes(raw[: raw.rindex(b"\xff\xda")])
    with pytest.raises(UserError, match="before the last scan of its pixels"):
        ImageSource(folder).read("a.jpg")


def test_names_with_backslashes_are_found_if_there_is_no_such_file(folder):
    (folder / "deep").mkdir()
    picture(3).save(folder / "deep/c.png")
    for source in (ImageSource(folder), ImageSource(archive_of(folder))):
        assert torch.equal(source.read("deep\\c.png"), torch.from_numpy(np.array(picture(3))).permute(2, 0, 1))
        assert source.missing(["deep\\c.png", "deep\\d.png"]) == {1: "image deep\\d.png not found"}
    picture(4).save(folder / "deep\\c.png")
    for source in (ImageSource(folder), ImageSource(archive_of(folder))):
        assert torch.equal(source.read("deep\\c.png"), torch.from_numpy(np.array(picture(4))).permute(2, 0, 1))


def archive_of(folder):
    """A new archive of a folder with its subfolders."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, str(file.relative_to(folder)))
    return path


@pytest.mark.parametrize("as_zip", [False, True])
def test_missing_files_are_found_in_nested_folders(folder, as_zip):
    (folder / "x/y").mkdir(parents=True)
    picture(3).save(folder / "x/y/c.png")
    (folder / "link.png").symlink_to("nowhere.png")
    if as_zip:
        (folder / "link.png").unlink()
    names = ["a.jpg", "x/y/c.png", "x/../b.png", "x/a.jpg", "z/a.jpg", "c.png", "link.png", "x", "A" * 900]
    source = ImageSource(archive_of(folder) if as_zip else folder)
    # A member is also found by the end of its path, as in an archive of a folder.
    assert list(source.missing(names)) == ([2, 3, 4, 6, 7, 8] if as_zip else [3, 4, 5, 6, 7, 8])
    assert source.missing(names)[3] == "image x/a.jpg not found"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can list any folder")
def test_files_in_a_folder_that_cannot_be_listed_are_asked_for_one_by_one(folder):
    folder.chmod(0o300)
    try:
        assert list(ImageSource(folder).missing(["a.jpg", "c.jpg"])) == [1]
    finally:
        folder.chmod(0o700)


def test_an_ambiguous_member_is_found_before_it_is_read(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "a.jpg", "x/a.jpg")
        archive.write(folder / "a.jpg", "y/a.jpg")
    assert ImageSource(path).missing(["a.jpg"]) == {0: "image a.jpg is ambiguous: x/a.jpg or y/a.jpg"}


@pytest.mark.parametrize("as_zip", [False, True])
def test_headers_show_other_sizes_and_formats(folder, as_zip):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    source = ImageSource(zipped(folder, "") if as_zip else folder)
    assert [source.header_problem(name, (20, 30)) for name in ("a.jpg", "b.png")] == [None, None]
    assert source.header_problem("a.jpg", (20, 31)) == "a.jpg is 30 x 20 pixels, but the annotations say 31 x 20"
    assert source.header_problem("a.jpg", (30, 20)) == "a.jpg is 30 x 20 pixels, but the annotations say 20 x 30"
    assert source.header_problem("empty.png", (20, 30)) == "empty.png is empty, a file of 0 bytes"
    assert source.header_problem("text.png", (20, 30)).startswith("text.png is damaged or not an image")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_headers_are_accepted_exactly_if_the_image_can_be_read_in_that_size(tmp_path, orientation, name):
    oriented(tmp_path, orientation, name)
    source = ImageSource(tmp_path)
    for size in ((20, 30), (30, 20)):
        try:
            source.read(name, size)
            readable = True
        except UserError:
            readable = False
        assert (source.header_problem(name, size) is None) == readable


def test_headers_of_files_that_end_early_are_not_enough(folder):
    for name in ("a.jpg", "b.png"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw + b"\0" * 20)
        assert ImageSource(folder).header_problem(name, (20, 30)) is None
        (folder / name).write_bytes(raw[: len(raw) * 3 // 4])
        assert ImageSource(folder).header_problem(name, (20, 30)).startswith(f"{name} ")
