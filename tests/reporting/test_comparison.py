"""A comparison as tables and as a page."""

import io
import json
import math
import re
from html.parser import HTMLParser

from rich.console import Console

from cpm_rcnn.reporting.comparison import comparison_page, print_comparison, write_comparison


def result(value, low, high, difference=None):
    found = {"value": value, "low": low, "high": high}
    keys = ("value", "low", "high")
    return found if difference is None else found | {"difference": dict(zip(keys, difference))}


COMPARISON = {
    "annotations": "/data/val<1>.json",
    "images": 5,
    "samples": 10,
    "seed": 0,
    "confidence": 0.95,
    "runs": [
        {
            "name": "old <a>",
            "source": "/a",
            "metrics": {"AP": result(0.4, 0.35, 0.45), "APs": result(math.nan, math.nan, math.nan)},
            "per_class": {"dog [x]": result(0.4, 0.3, 0.5)},
        },
        {
            "name": "new",
            "source": "/b",
            "metrics": {
                "AP": result(0.45, 0.4, 0.5, (0.05, 0.01, 0.08)),
                "APs": result(math.nan, math.nan, math.nan, (math.nan,) * 3),
            },
            "per_class": {"dog [x]": result(0.42, 0.3, 0.5, (0.02, -0.04, 0.06))},
        },
    ],
}


def cells(page):
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", page)]


def test_the_tables_show_percent_with_intervals_and_signed_differences():
    console = Console(file=io.StringIO(), width=120)
    print_comparison(COMPARISON, console)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "│" in line]
    assert ["AP", "old <a>", "40.0", "35.0 to 45.0", "", ""] in rows
    assert ["", "new", "45.0", "40.0 to 50.0", "+5.0", "+1.0 to +8.0"] in rows
    assert ["", "new", "–", "–", "–", "–"] in rows
    assert ["dog [x]", "old <a>", "40.0", "30.0 to 50.0", "", ""] in rows
    assert ["", "new", "42.0", "30.0 to 50.0", "+2.0", "-4.0 to +6.0"] in rows


def test_the_page_has_the_same_numbers_and_one_drawing_per_defined_difference():
    page = comparison_page(COMPARISON)
    assert cells(page)[:6] == ["AP", "old &lt;a&gt;", "40.0", "35.0 to 45.0", "", ""]
    assert page.count("<svg") == 2
    assert '<td class="clear">+5.0</td>' in page
    assert '<td class="clear">+2.0</td>' not in page
    assert "val&lt;1&gt;.json" in page
    assert "nan" not in page


def test_the_drawings_of_a_table_have_one_scale_and_lie_inside():
    page = comparison_page(COMPARISON)
    first, second = re.findall("<svg.*?</svg>", page)
    for svg, (low, high), largest in ((first, (0.01, 0.08), 0.08), (second, (-0.04, 0.06), 0.06)):
        zero, line = re.findall(r'x1="([\d.]+)" x2="([\d.]+)"', svg)
        assert zero == ("80.0", "80.0")
        assert [float(end) for end in line] == [round(80 + 76 * end / largest, 1) for end in (low, high)]


def test_the_page_needs_no_other_file_and_fits_a_phone():
    class Tags(HTMLParser):
        open_tags, seen = [], []

        def handle_starttag(self, tag, attrs):
            self.seen.append((tag, dict(attrs)))
            if tag not in ("meta", "line", "circle"):
                self.open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            self.seen.append((tag, dict(attrs)))

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    page, parser = comparison_page(COMPARISON), Tags()
    parser.feed(page)
    assert not parser.open_tags
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parser.seen}
    assert not any({"src", "href"} & set(attributes) for _, attributes in parser.seen)
    assert not re.search(r"url\(|@import|https?:", page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parser.seen
    assert "overflow-x: auto" in page


def test_undefined_values_are_null_in_the_json(tmp_path):
    write_comparison(COMPARISON, tmp_path / "new")
    content = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert content["runs"][1]["metrics"]["APs"]["difference"] == {"value": None, "low": None, "high": None}
    assert content["runs"][0]["metrics"]["AP"]["value"] == 0.4
    assert (tmp_path / "new" / "comparison.html").read_text() == comparison_page(COMPARISON)
