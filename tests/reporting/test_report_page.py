"""The report as a page and as JSON."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.report import report_page, write_report
from cpm_rcnn.reporting.report.embedding import crop_view, embed, whole_view
from cpm_rcnn.reporting.report.figures import encoded_series, most_confused
from cpm_rcnn.reporting.report.page import SECTIONS
from sample_reports import minimal_report, open_image, rich_report

IMAGE = {"file_name": "a.jpg", "width": 1600, "height": 1200}


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_both_files_are_written_and_undefined_values_are_null(tmp_path):
    write_report(minimal_report(), tmp_path / "new", None)
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["metrics"]["AP"] is None
    assert (tmp_path / "new" / "report.html").read_text() == report_page(minimal_report(), None)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_the_json_gives_the_same_page():
    report = rich_report()
    content = json.loads(re.sub(r"\bNaN\b", "null", json.dumps(report)))
    assert report_page(content, open_image) == report_page(report, open_image)


def test_a_failed_write_leaves_the_old_page(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(minimal_report(), tmp_path, None)


def test_every_section_has_a_heading_and_a_link_also_without_data():
    for page in (report_page({}, None), report_page(rich_report(), None)):
        assert re.findall(r'<h2 id="(\w+)"', page) == list(SECTIONS)
        assert re.findall(r'<li><a href="#(\w+)"', page) == list(SECTIONS)


def test_the_page_needs_no_other_file():
    page = report_page(rich_report(), open_image)
    assert not re.search(r"url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")|<script src|<iframe", page)
    assert {source[:23] for source in re.findall(r'src="([^"]*)"', page)} == {"data:image/jpeg;base64,"}


def test_numbers_are_in_percent_with_one_decimal_and_undefined_ones_a_dash():
    page = report_page(rich_report(), None)
    assert "<dt>AP</dt><dd>41.2</dd>" in page
    assert "<dt>APs</dt><dd>–</dd>" in page
    shown = re.sub("<(script|style).*?</(script|style)>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", shown, flags=re.IGNORECASE)


def test_large_images_are_reduced_and_each_is_opened_once():
    opened = []

    def read(file_name):
        opened.append(file_name)
        return np.full((1200, 1600, 3), 90, dtype=np.uint8)

    views = [whole_view(IMAGE), (100.0, 50.0, 400.0, 300.0), whole_view(IMAGE)]
    whole, part, again = embed([IMAGE] * 3, views, read)
    assert opened == ["a.jpg"]
    assert decoded(whole.uri).size == (640, 480)
    assert decoded(part.uri).size == (400, 300)
    assert again.uri is whole.uri


def test_an_image_that_cannot_be_read_is_replaced_by_the_reason():
    def fail(file_name):
        raise UserError(f"{file_name} <is> damaged")

    (picture,) = embed([IMAGE], [whole_view(IMAGE)], fail)
    assert picture.uri == ""
    report = rich_report(images=1, labels=0)
    page = report_page(report, fail)
    assert "street/000001.jpg &lt;is&gt; damaged" in page
    assert "<img" not in page


@pytest.mark.parametrize(
    "box", [(0, 0, 10, 10), (1590, 1190, 10, 10), (700, 100, 30, 900), (0, 0, 1600, 1200), (50, 600, 1500, 20)]
)
def test_a_crop_contains_its_box_and_lies_in_the_image(box):
    x, y, width, height = crop_view(IMAGE, [box])
    assert 0 <= x <= box[0]
    assert 0 <= y <= box[1]
    assert box[0] + box[2] <= x + width <= 1600
    assert box[1] + box[3] <= y + height <= 1200


def test_curves_are_encoded_with_two_digits_per_value():
    series = {"name": "mean", "precision": {"0.50": [1.0, 0.0, float("nan")]}, "f1": [0.5, None]}
    series |= {"precision_at": [], "recall_at": []}
    (encoded,) = encoded_series({"series": [series]})
    assert encoded["0.50"] == "zz00  "
    assert int(encoded["f1"][:2], 36) == 648
    assert encoded["f1"][2:] == "  "


def test_confusions_are_listed_without_the_background_most_frequent_first():
    counts = [[5, 1, 9], [3, 7, 0], [8, 8, 0]]
    pairs = most_confused({"classes": ["cat", "dog", "background"], "counts": counts})
    assert [(pair["annotated"], pair["detected"], pair["count"]) for pair in pairs] == [
        ("dog", "cat", 3),
        ("cat", "dog", 1),
    ]
    assert pairs[0]["share"] == 0.3
