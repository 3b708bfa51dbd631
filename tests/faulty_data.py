"""A data set of shapes in which faults are planted."""

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from cpm_rcnn.data.shapes import write_shapes

TRAIN, VAL = "annotations/instances_train.json", "annotations/instances_val.json"


def write_clean(root: Path) -> Path:
    """Shapes without any fault."""
    write_shapes(root, 60, 30)
    return root


def plant_faults(root: Path) -> list[tuple[str, str, str, str, str]]:
    """Plant one fault of each kind into the shapes in ``root``.

    Returns:
        What a check must find: severity, kind, the file with its split (or the annotation file), the id, and a part of
        the sentence or the detail.
    """
    train, val = (json.loads((root / path).read_text()) for path in (TRAIN, VAL))
    categories = [{"id": 0, "name": "shapes"}, *train["categories"]]
    categories += [{"id": 6 + k, "name": name} for k, name in enumerate(("hexagon", "heart", "moon"))]
    train["categories"] = val["categories"] = categories
    images = {image["id"]: image for image in train["images"]}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in train["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    # Images with at least one object that is not a crowd, one for each fault.
    usable = iter([key for key in images if any(not entry["iscrowd"] for entry in by_image.get(key, []))])

    def folder(content: dict[str, Any]) -> Path:
        return root / ("train" if content is train else "val")

    def add_image(content: dict[str, Any], number: int, name: str, source: int) -> dict[str, Any]:
        """An image with the size and the objects of a training image."""
        content["images"].append({**images[source], "id": number, "file_name": name})
        content["annotations"] += [
            {**entry, "id": 10 * number + k, "image_id": number} for k, entry in enumerate(by_image[source])
        ]
        return content["images"][-1]

    def add_object(content: dict[str, Any], number: int, image: int, bbox: Any, **fields: Any) -> None:
        entry = {"id": number, "image_id": image, "category_id": 1, "bbox": bbox, "area": 50, "iscrowd": 0}
        content["annotations"].append({**entry, **fields})

    def path_of(number: int) -> Path:
        return root / "train" / images[number]["file_name"]

    expected = []

    def expect(severity: str, kind: str, number: int | str, name: str, text: str = "") -> None:
        place = f"train/{images[number]['file_name']}" if isinstance(number, int) else number
        expected.append((severity, kind, place, name, text))

    json_file, host = str(root / TRAIN), next(usable)
    # Entries of the json.
    train["images"].append({**images[host]})
    expect("fault", "invalid annotations", json_file, f"image {host}", "image listed twice")
    train["images"].append({**images[host], "id": 900, "file_name": "../900.jpg"})
    expect("fault", "invalid annotations", json_file, "image 900", "leaves the image folder")
    train["annotations"].append({**train["annotations"][0]})
    expect(
        "fault",
        "invalid annotations",
        json_file,
        f"annotation {train['annotations'][0]['id']}",
        "annotation listed twice",
    )
    for number, text, bbox, fields in (
        (901, "of an unknown image", [1, 1, 20, 20], {"image_id": 99999}),
        (902, "of an unknown category", [1, 1, 20, 20], {"category_id": 77}),
        (903, "not four finite numbers", [1, 1, 20], {}),
        (904, "negative width", [1, 1, -20, 20], {}),
        (905, "outside its image", [900, 1, 20, 20], {}),
        (906, "iscrowd is neither 0 nor 1", [1, 1, 20, 20], {"iscrowd": 2}),
    ):
        add_object(train, number, host, bbox, **fields)
        expect("fault", "invalid annotations", json_file, f"annotation {number}", text)
    add_object(train, 907, host, [5, 5, 0, 20])
    expect("warning", "unusual annotations", json_file, "annotation 907", "without area")

    # Files of images.
    path_of(missing := next(usable)).unlink()
    expect("fault", "unreadable images", missing, f"image {missing}", "not found")
    path_of(garbage := next(usable)).write_bytes(b"this is not an image")
    expect("fault", "unreadable images", garbage, f"image {garbage}", "is damaged")
    path_of(empty := next(usable)).write_bytes(b"")
    expect("fault", "unreadable images", empty, f"image {empty}", "0 bytes")
    path = path_of(half := next(usable))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    expect("fault", "unreadable images", half, f"image {half}", "ends early")
    path = path_of(cut := next(usable))
    path.write_bytes(path.read_bytes()[:-20])
    expect("warning", "truncated images", cut, f"image {cut}", "ends early")
    path = path_of(resized := next(usable))
    Image.open(path).resize((100, 90)).save(path)
    expect("fault", "image sizes", resized, f"image {resized}", "is 100 x 90 pixels")

    # Copies.
    for content, number, name, kind, severity in (
        (val, 910, "copy.jpg", "equal images", "fault"),
        (train, 911, "twin.jpg", "equal images", "warning"),
        (val, 912, "edited.jpg", "similar images", "warning"),
        (train, 913, "frame.jpg", "similar images", "note"),
    ):
        source = next(usable)
        add_image(content, number, name, source)
        target = folder(content) / name
        if kind == "equal images":
            shutil.copy(path_of(source), target)
        else:
            Image.open(path_of(source)).save(target, quality=30)
        place = f"{folder(content).name}/{name}"
        expect(severity, kind, place, f"image {number}", f"train/{images[source]['file_name']}")

    # Boxes.
    original = next(entry for entry in by_image[host] if not entry["iscrowd"])
    x, y, w, h = original["bbox"]
    add_object(train, 920, host, [x, y, w + 0.1, h], category_id=original["category_id"])
    expect("warning", "duplicate boxes", host, "annotation 920", f"as annotation {original['id']}")
    add_object(train, 921, host, [0, 0, images[host]["width"], images[host]["height"]])
    expect("warning", "box of the whole image", host, "annotation 921")
    add_object(train, 922, host, [10, 50, 150, 4])
    expect("warning", "aspect ratio", host, "annotation 922")
    add_object(train, 923, host, [50, 50, 3, 3])
    expect("note", "small objects", host, "annotation 923", "3 x 3 pixels")
    expect("note", "anchor sizes", host, "annotation 923", "IoU 0.0")

    # Classes.
    expect("warning", "root class", json_file, "category 0 shapes")
    expect("warning", "class without objects", json_file, "category 6 hexagon")
    add_object(val, 930, val["images"][0]["id"], [20, 20, 40, 40], category_id=7)
    expect("fault", "class missing in train", json_file, "category 7 heart", "val 1")
    add_object(train, 931, host, [20, 20, 40, 40], category_id=8)
    expect("warning", "class missing in val", str(root / VAL), "category 8 moon", "train 1")
    expect("warning", "rare class", json_file, "category 8 moon", "train 1")

    # Images that nobody annotated.
    blank = [image["id"] for image in val["images"][5:10]]
    val["annotations"] = [entry for entry in val["annotations"] if entry["image_id"] not in blank]
    name = next(image["file_name"] for image in val["images"] if image["id"] == blank[0])
    expect("warning", "images without objects", f"val/{name}", f"image {blank[0]}")

    for path_name, content in ((TRAIN, train), (VAL, val)):
        (root / path_name).write_text(json.dumps(content))
    return expected
