"""The result of the checks of a data set: on the terminal, as JSON, and as a page with the images in question."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpm_rcnn.data.doctor.examination import Examination
from cpm_rcnn.data.doctor.finding import SEVERITIES, Finding
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.settings import Split
from cpm_rcnn.reporting.report.embedding import Picture, crop_view, embed, whole_view
from cpm_rcnn.reporting.report.template import render, write_page
from cpm_rcnn.reporting.tables import write_metrics

JSON, HTML = "check.json", "check.html"

_STYLES = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
# Examples of a finding on the terminal, and findings that a training prints.
_EXAMPLES, _LINES = 3, 5
_SECTIONS = {"fault": "Faults", "warning": "Warnings", "note": "Notes", "splits": "Splits", "classes": "Classes"}

OpenImage = Callable[[Split, str], np.ndarray]


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings with their advice and first examples."""
    table = Table(title=_summary(findings), title_justify="left", show_lines=True)
    table.add_column("severity")
    table.add_column("finding", overflow="fold")
    table.add_column("where", overflow="fold")
    for finding in findings:
        text = " ".join(part for part in (finding.sentence, finding.advice) if part)
        where = [str(example) for example in finding.examples[:_EXAMPLES]]
        where += ["..."] * (finding.count > len(where) > 0)
        style = _STYLES[finding.severity]
        table.add_row(f"[{style}]{finding.severity}[/]", escape(text), escape("\n".join(where)))
    return table


def print_examination(examination: Examination, console: Console | None = None) -> None:
    """Print the findings, the overrides that solve some of them, and what was checked, by default to the terminal."""
    console = console or Console()
    if examination.findings:
        console.print(findings_table(examination.findings))
    overrides = _overrides(examination.findings)
    if overrides:
        # Not wrapped, so that it can be pasted.
        console.print(f"Overrides to consider: {overrides}", markup=False, highlight=False, soft_wrap=True)
    for split in examination.splits:
        console.print(f"{split['name']}: {_contents(split)}", markup=False, highlight=False, soft_wrap=True)
    if not examination.findings:
        console.print("Nothing was found.")


def print_training_findings(findings: Sequence[Finding]) -> None:
    """Print the most important findings about the annotations of a training, one line each."""
    for finding in findings[:_LINES]:
        example = f" ({finding.examples[0]})" if finding.examples else ""
        override = f" To change: {shlex.quote(finding.override)}" if finding.override else ""
        print(f"{finding.severity}: {finding.sentence.removesuffix('.')}{example}.{override}")
    if findings:
        print("python -m cpm_rcnn.check with the arguments of this training has the details and reads the images too.")


def write_examination(examination: Examination, folder: Path, open_image: OpenImage | None) -> None:
    """Write ``check.json`` and ``check.html`` to a folder.

    Args:
        examination: the result of the checks.
        folder: the folder; it is created if it is missing.
        open_image: returns an image of a split as uint8 RGB (H, W, 3), or raises ``UserError``, whose message is then
            shown in its place. None embeds no pictures.

    Raises:
        UserError: a file cannot be written.
    """
    counts = Counter(finding.severity for finding in examination.findings)
    totals = {f"{severity}s": counts[severity] for severity in SEVERITIES}
    write_metrics(totals | asdict(examination), folder / JSON)
    write_page(examination_page(examination, open_image), folder / HTML)


def examination_page(examination: Examination, open_image: OpenImage | None) -> str:
    """The result as one page of HTML without external files; see :func:`write_examination`."""
    by_severity = {
        severity: [finding for finding in examination.findings if finding.severity == severity]
        for severity in SEVERITIES
    }
    # In the order of the page.
    pictures = iter(_pictures([each for part in by_severity.values() for each in part], open_image))
    shown: dict[str, list[dict[str, Any]]] = {
        severity: [
            {
                "finding": finding,
                "override": shlex.quote(finding.override) if finding.override else "",
                "examples": [(example, next(pictures) if example.size else None) for example in finding.examples],
            }
            for finding in findings
        ]
        for severity, findings in by_severity.items()
    }
    description = [[split["name"], _contents(split)] for split in examination.splits]
    if examination.anchors is not None:
        description += _anchor_facts(examination.anchors)
    present = {severity: bool(findings) for severity, findings in by_severity.items()}
    return render(
        "check.html",
        title="Check of the data",
        description=description,
        sections=_SECTIONS,
        short_names={},
        present=present | {"splits": bool(examination.splits), "classes": bool(examination.classes)},
        reasons={
            **{severity: f"There are no {severity}s." for severity in SEVERITIES},
            **dict.fromkeys(("splits", "classes"), "No split can be read."),
        },
        shown=shown,
        splits=examination.splits,
        classes=examination.classes,
    )


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(counted(counts[severity], severity, f"{severity}s") for severity in SEVERITIES)


def _contents(split: dict[str, Any]) -> str:
    if not split["annotated"]:
        return f"{counted(split['images'], 'image', 'images')} without annotations"
    return (
        f"{counted(split['images'], 'image', 'images')}, {counted(split['objects'], 'object', 'objects')}; "
        f"{split['without_objects']} without objects"
    )


def _anchor_facts(anchors: dict[str, Any]) -> list[list[str]]:
    sizes, suggested = (", ".join(f"{size:g}" for size in anchors[key]) for key in ("sizes", "suggested_sizes"))
    return [
        ["anchor sizes", f"{sizes}; {100 * anchors['low_iou']:.1f} % of the objects have no anchor with IoU 0.3"],
        ["anchor sizes of these objects", f"{suggested}; {100 * anchors['suggested_low_iou']:.1f} %"],
        [
            "if border anchors are ignored",
            f"{100 * anchors['without_border_anchors']:.1f} % of the objects have no positive anchor",
        ],
    ]


def _overrides(findings: Sequence[Finding]) -> str:
    return " ".join(shlex.quote(finding.override) for finding in findings if finding.override)


def _pictures(findings: Sequence[Finding], open_image: OpenImage | None) -> list[Picture]:
    """The pictures of all examples that are images."""
    entries, views = [], []
    for example in (example for finding in findings for example in finding.examples if example.size):
        width, height = example.size or (0, 0)
        # Splits can have images of the same name.
        entry = {"file_name": f"{example.split}/{example.file}", "width": width, "height": height}
        entries.append(entry)
        views.append(whole_view(entry) if example.whole else crop_view(entry, example.boxes))

    def open_by_name(name: str) -> np.ndarray:
        assert open_image is not None
        split, _, file_name = name.partition("/")
        return open_image(split, file_name)  # type: ignore[arg-type]

    return embed(entries, views, None if open_image is None else open_by_name)
