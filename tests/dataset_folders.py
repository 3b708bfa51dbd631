"""Writers of data sets in several formats and layouts, from the content of a json in COCO's format."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from cpm_rcnn.data.shapes import CATEGORIES, write_shapes

Content = dict[str, Any]
NAMES = {category["id"]: category["name"] for category in CATEGORIES}


def shapes(root: Path, train: int = 12, val: int = 5, crowds: bool = False) -> dict[str, Content]:
    """Render shapes into ``root``; returns the contents of the jsons by split, which only have crowds on request."""
    write_shapes(root, train, val)
    contents = {}
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}.json"
        contents[split] = json.loads(path.read_text())
        if not crowds:
            kept = [entry for entry in contents[split]["annotations"] if not entry["iscrowd"]]
            contents[split]["annotations"] = kept
            path.write_text(json.dumps(contents[split]))
    return contents


def objects_of(content: Content, image: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]


def copy_images(source: Path, target: Path, content: Content) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        shutil.copy(source / image["file_name"], target / image["file_name"])


def voc_xml(image: Mapping[str, Any], objects: Iterable[Mapping[str, Any]]) -> str:
    lines = ["<annotation>", f"<filename>{escape(image['file_name'])}</filename>"]
    lines += [f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"]
    for entry in objects:
        x, y, w, h = entry["bbox"]
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h))
        lines += ["<object>", f"<name>{NAMES[entry['category_id']]}</name>"]
        lines += [f"<difficult>{entry['iscrowd']}</difficult>"]
        lines += ["<bndbox>", *(f"<{name}>{value}</{name}>" for name, value in corners), "</bndbox>", "</object>"]
    return "\n".join([*lines, "</annotation>"])


def yolo_lines(image: Mapping[str, Any], objects: Iterable[Mapping[str, Any]]) -> str:
    width, height = image["width"], image["height"]
    lines = []
    for entry in objects:
        x, y, w, h = entry["bbox"]
        values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        lines.append(f"{entry['category_id'] - 1} " + " ".join(f"{value:.6f}" for value in values))
    return "\n".join([*lines, ""])


def cvat_xml(contents: Mapping[str, Content]) -> str:
    """The contents of several subsets; the subset "" has no name."""
    labels = [f"<label><name>{name}</name></label>" for name in NAMES.values()]
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "<version>1.1</version>"]
    lines += [f"<meta><task><labels>{''.join(labels)}</labels></task></meta>"]
    for subset, content in contents.items():
        attribute = f" subset={quoteattr(subset)}" if subset else ""
        for number, image in enumerate(content["images"]):
            size = f'width="{image["width"]}" height="{image["height"]}"'
            lines.append(f'<image id="{number}" name={quoteattr(image["file_name"])}{attribute} {size}>')
            for entry in objects_of(content, image):
                x, y, w, h = entry["bbox"]
                box = f'xtl="{x:.2f}" ytl="{y:.2f}" xbr="{x + w:.2f}" ybr="{y + h:.2f}"'
                lines.append(f'  <box label="{NAMES[entry["category_id"]]}" occluded="0" {box} z_order="0"></box>')
            lines.append("</image>")
    return "\n".join([*lines, "</annotations>"])


def write_voc(root: Path, source: Path, contents: Mapping[str, Content], layout: str = "devkit") -> Path:
    """``devkit`` has lists of the splits, ``kangaroo`` no splits, and ``flat`` a folder per split, as Roboflow's."""
    for split, content in contents.items():
        folders = {
            "devkit": ("JPEGImages", "Annotations"),
            "kangaroo": ("images", "annots"),
            "flat": ({"train": "train", "val": "valid"}[split],) * 2,
        }[layout]
        images, annotations = (root / folder for folder in folders)
        # Names of both splits would be the same.
        prefix = f"{split}_" if layout == "devkit" else ""
        for folder in (images, annotations):
            folder.mkdir(parents=True, exist_ok=True)
        stems = []
        for image in content["images"]:
            name = prefix + image["file_name"]
            stems.append(PurePosixPath(name).stem)
            shutil.copy(source / split / image["file_name"], images / name)
            (annotations / f"{stems[-1]}.xml").write_text(voc_xml(image, objects_of(content, image)))
        if layout == "devkit":
            lists = root / "ImageSets" / "Main"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


def write_yolo(root: Path, source: Path, contents: Mapping[str, Content], layout: str = "ultralytics") -> Path:
    """``ultralytics`` has images/train, ``roboflow`` train/images and paths from elsewhere, ``lists`` text files."""
    stated = {}
    for split, content in contents.items():
        name = {"train": "train", "val": "valid"}[split] if layout == "roboflow" else split
        images, labels = (
            root / (f"{name}/{kind}" if layout == "roboflow" else f"{kind}/{name}") for kind in ("images", "labels")
        )
        labels.mkdir(parents=True)
        copy_images(source / split, images, content)
        for image in content["images"]:
            if objects := objects_of(content, image):
                (labels / f"{PurePosixPath(image['file_name']).stem}.txt").write_text(yolo_lines(image, objects))
        stated[split] = {"roboflow": f"../{name}/images", "lists": f"{split}.txt"}.get(layout, f"images/{name}")
        if layout == "lists":
            lines = [f"./images/{name}/{image['file_name']}" for image in content["images"]]
            (root / f"{split}.txt").write_text("\n".join(lines))
    names = list(NAMES.values()) if layout == "roboflow" else dict(enumerate(NAMES.values()))
    lines = [f"{key}: {path}" for key, path in stated.items()]
    (root / "data.yaml").write_text("\n".join([*lines, f"nc: {len(names)}", f"names: {json.dumps(names)}"]))
    if isinstance(names, dict):
        mapping = "".join(f"  {key}: {name}\n" for key, name in names.items())
        (root / "data.yaml").write_text("\n".join(["path: .", *lines, "names:", mapping]))
    return root


def write_cvat(root: Path, source: Path, contents: Mapping[str, Content], layout: str = "subsets") -> Path:
    """``subsets`` is a project's file with a subset per split, ``folders`` a file per split."""
    subsets = {"train": "Train", "val": "Validation"}
    for split, content in contents.items():
        folder = root / "images" / subsets[split] if layout == "subsets" else root / split / "images"
        copy_images(source / split, folder, content)
        if layout == "folders":
            (root / split / "annotations.xml").write_text(cvat_xml({"": content}))
    if layout == "subsets":
        by_subset = {subsets[split]: content for split, content in contents.items()}
        (root / "annotations.xml").write_text(cvat_xml(by_subset))
    return root


def write_coco(root: Path, source: Path, contents: Mapping[str, Content], layout: str = "roboflow") -> Path:
    """``roboflow`` has a json beside the images of each split, ``annotations`` a folder of jsons."""
    for split, content in contents.items():
        folder = root / ({"train": "train", "val": "valid"}[split] if layout == "roboflow" else f"images/{split}2020")
        copy_images(source / split, folder, content)
        json_folder = folder if layout == "roboflow" else root / "annotations"
        json_folder.mkdir(exist_ok=True)
        name = "_annotations.coco.json" if layout == "roboflow" else f"instances_{split}2020.json"
        (json_folder / name).write_text(json.dumps(content))
    return root
