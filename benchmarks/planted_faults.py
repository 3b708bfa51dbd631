"""Do faults that are planted in annotations show up in the report of an evaluation?

A wrong label and a shift of all boxes are planted in the validation annotations of the quickstart's data, on which a
finished run is evaluated again. A class that exists twice (half of the circles are called disc) is planted in the
training annotations too, and a model is trained on them.

    python benchmarks/planted_faults.py outputs/quickstart [--steps 500]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Plant each fault, evaluate, and print what the report says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of experiment=quickstart")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--steps", type=int, default=500, help="steps of the training with the double class")
    parser.add_argument("--out", type=Path, default=Path("outputs/planted"))
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    train, val = (
        json.loads((options.data / f"annotations/instances_{name}.json").read_text()) for name in ("train", "val")
    )

    show("none", evaluate(options, out, "none", val))
    changed, planted = wrong_label(val)
    print("planted:", planted)
    show("wrong label", evaluate(options, out, "wrong_label", changed))
    show("shift by 4 px", evaluate(options, out, "shift", shifted(val, 4)))
    show("double class", train_on(options, out, double_class(train, 0), double_class(val, 1)))


def wrong_label(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The largest annotation gets the next category."""
    annotations = [dict(each) for each in content["annotations"]]
    chosen = max(annotations, key=lambda each: each["area"])
    names = {each["id"]: each["name"] for each in content["categories"]}
    ids = sorted(names)
    before = chosen["category_id"]
    chosen["category_id"] = ids[(ids.index(before) + 1) % len(ids)]
    text = f"image {chosen['image_id']}: {names[before]} is annotated as {names[chosen['category_id']]}"
    return {**content, "annotations": annotations}, text


def shifted(content: dict[str, Any], pixels: int) -> dict[str, Any]:
    """All boxes are shifted to the left."""
    boxes = [{**each, "bbox": [each["bbox"][0] - pixels, *each["bbox"][1:]]} for each in content["annotations"]]
    return {**content, "annotations": boxes}


def double_class(content: dict[str, Any], seed: int) -> dict[str, Any]:
    """Half of the circles are of a new category, disc."""
    rng = np.random.default_rng(seed)
    (circle,) = (each["id"] for each in content["categories"] if each["name"] == "circle")
    disc = max(each["id"] for each in content["categories"]) + 1
    annotations = [
        {**each, "category_id": disc} if each["category_id"] == circle and rng.uniform() < 0.5 else each
        for each in content["annotations"]
    ]
    categories = [*content["categories"], {"id": disc, "name": "disc"}]
    return {**content, "annotations": annotations, "categories": categories}


def evaluate(options: argparse.Namespace, out: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """The report of the run on changed annotations."""
    path = out / f"{name}.json"
    path.write_text(json.dumps(content))
    command("eval", f"ckpt={options.run}", f"split={path}", f"images={options.data.absolute() / 'val'}", out / name)
    return json.loads((out / name / "report.json").read_text())


def train_on(options: argparse.Namespace, out: Path, train: dict[str, Any], val: dict[str, Any]) -> dict[str, Any]:
    """The report of a model that is trained on changed annotations."""
    paths = {"train": out / "double_train.json", "val": out / "double_val.json"}
    for name, content in (("train", train), ("val", val)):
        paths[name].write_text(json.dumps(content))
    steps = options.steps
    command(
        "train",
        *("experiment=quickstart", "data=custom", f"data.root={options.data.absolute()}"),
        *(f"data.{name}_json={path}" for name, path in paths.items()),
        *("data.train_images=train", "data.val_images=val", f"schedule.max_steps={steps}"),
        *(f"schedule.milestones=[{steps * 3 // 4},{steps * 9 // 10}]", f"schedule.val_interval={steps}"),
        out / "double",
    )
    return json.loads((out / "double" / "report.json").read_text())


def command(name: str, *arguments: str | Path) -> None:
    """Run a command of the package; the last argument is the folder of the results."""
    *options, folder = map(str, arguments)
    line = [sys.executable, "-m", f"cpm_rcnn.{name}", *options, "trainer=cpu", f"hydra.run.dir={folder}"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def show(title: str, report: dict[str, Any]) -> None:
    """Print the warnings of a report and its first label to check."""
    print(f"\n{title}: AP {100 * report['metrics']['AP']:.1f}")
    for finding in report["findings"]:
        if finding["level"] == "warning":
            print(f"  [{finding['section']}] {finding['text']}")
    for label in report["labels"]["list"][:1]:
        print(f"  first label to check: image {label['image_id']}, {label['kind']}: {label['text']}")


if __name__ == "__main__":
    main()
