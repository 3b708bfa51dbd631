"""The pages of reports, comparisons and data checks in headless Chromium, on a desktop and on a phone."""

import os
import shutil
from contextlib import contextmanager

import pytest

from cpm_rcnn.reporting.comparison import comparison_page
from cpm_rcnn.reporting.data_check import examination_page
from cpm_rcnn.reporting.report import report_page
from sample_reports import NAMES, awkward_examination, minimal_report, open_image, rich_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
AWKWARD = ["<b>bold</b>", "\"quoted\" & 'single'", "</script><script>window.broken = true</script>", "{{ 7 * 7 }}"]
EXECUTABLE = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser():
    if EXECUTABLE is None:
        pytest.skip("Chromium is not installed (chromium, chromium-browser or google-chrome on PATH, or CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox does not work for root, nor in most containers.
        started = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    interval = {"value": 0.4, "low": 0.35, "high": 0.45}
    difference = {"difference": {"value": 0.05, "low": 0.01, "high": 0.08}}
    runs = [
        {"name": name, "metrics": {"AP": interval | extra}, "per_class": {AWKWARD[0]: interval | extra}}
        for name, extra in (("old " + 40 * "x", {}), ("new", difference))
    ]
    comparison = {"annotations": "/data/val.json", "images": 5, "samples": 10, "confidence": 0.95, "runs": runs}
    many = rich_report([f"class {k}" for k in range(1203)], images=2, labels=2)
    texts = {
        "rich": report_page(rich_report(), open_image),
        "minimal": report_page(minimal_report(), None),
        "awkward": report_page(rich_report([*AWKWARD, *NAMES]), open_image),
        "many": report_page(many, open_image),
        "nothing": report_page({"title": AWKWARD[2]}, None),
        "comparison": comparison_page(comparison),
        "check": examination_page(awkward_examination(AWKWARD[2]), lambda split, name: open_image("street/000001.jpg")),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, "utf-8")
    return folder


@pytest.fixture
def opened(browser, pages):
    """Opens a page; it must report no error and request nothing but itself."""

    @contextmanager
    def open_page(name, viewport=DESKTOP):
        page = browser.new_page(viewport=viewport)
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((pages / f"{name}.html").as_uri())
        try:
            yield page
        finally:
            page.close()
        assert not complaints
        assert [url for url in requests if not url.startswith("data:")] == [(pages / f"{name}.html").as_uri()]

    return open_page


def choose(page, section, filter_name, value):
    """Choose a filter, and return the cards of the section that are still visible."""
    gallery = page.locator(f"section:has(#{section})")
    gallery.locator(f"[data-filter={filter_name}]").select_option(value)
    return gallery.locator(".card:visible")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["rich", "minimal", "awkward", "many", "nothing", "comparison", "check"])
def test_pages_load_without_errors_and_fit_the_screen(opened, name, viewport):
    with opened(name, viewport) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert page.evaluate("document.body.scrollWidth") <= viewport["width"]
        page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 1)")
        assert page.evaluate("window.broken") is None


@pytest.mark.parametrize(("name", "charts"), [("rich", 12), ("awkward", 12), ("many", 12), ("minimal", 0)])
def test_every_chart_has_marks_inside(opened, name, charts):
    with opened(name) as page:
        found = page.evaluate(
            """[...document.querySelectorAll("svg.chart")].map((svg) => {
                const outer = svg.getBoundingClientRect();
                const marks = [...svg.querySelectorAll(".mark")];
                const texts = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
                const inside = marks.map((mark) => mark.getBoundingClientRect()).every((r) =>
                    r.left >= outer.left - 1 && r.right <= outer.right + 1 && r.bottom <= outer.bottom + 1);
                const readable = texts.every((r) => r.left >= outer.left - 2 && r.right <= outer.right + 6);
                return [svg.getAttribute("aria-label"), marks.length, inside, readable];
            })"""
        )
    assert len(found) == charts
    for label, marks, inside, readable in found:
        assert label
        assert marks > 0, label
        assert inside, label
        assert readable, label


@pytest.mark.parametrize("name", ["rich", "many"])
def test_texts_of_charts_are_readable_on_a_phone(opened, name):
    with opened(name, PHONE) as page:
        sizes = page.evaluate(
            """[...document.querySelectorAll("svg.chart")].map((svg) =>
                svg.getScreenCTM().a * Math.min(...[...svg.querySelectorAll("text")]
                    .map((text) => parseFloat(getComputedStyle(text).fontSize))))"""
        )
    assert min(sizes) >= 9


def test_sections_without_data_say_why(opened):
    with opened("minimal") as page:
        assert "hotcoco is not installed" in page.locator("section:has(#errors)").inner_text()
        for section in ("scores", "curves", "sizes", "calibration", "confusion", "offsets", "images", "labels"):
            assert page.locator(f"section:has(#{section}) .empty:visible").count() >= 1, section
        assert "NaN" not in page.locator("body").inner_text()


def test_filters_hide_other_boxes_and_the_images_without_a_match(opened):
    with opened("rich", PHONE) as page:
        everything = page.locator("section:has(#images) .card:visible").count()
        cards = choose(page, "images", "class", "dog")
        assert 0 < cards.count() < everything
        for i in range(cards.count()):
            boxes = cards.nth(i).locator(".box:visible")
            assert {boxes.nth(k).get_attribute("data-class") for k in range(boxes.count())} == {"dog"}
        both = choose(page, "images", "kind", "missed")
        assert both.count() <= cards.count()
        assert page.locator("section:has(#images) output").inner_text() == f"{both.count()} of {everything} images"
        choose(page, "images", "class", "")
        assert choose(page, "images", "kind", "").count() == everything


def test_labels_are_filtered_by_kind_and_by_both_classes(opened):
    with opened("rich") as page:
        cards = choose(page, "labels", "kind", "other_class")
        assert {cards.nth(i).get_attribute("data-kind") for i in range(cards.count())} == {"other_class"}
        choose(page, "labels", "kind", "")
        cards = choose(page, "labels", "class", "car")
        assert cards.count() > 0
        for i in range(cards.count()):
            assert "car" in [cards.nth(i).get_attribute(f"data-{key}") for key in ("class", "annotated")]


def test_awkward_class_names_are_shown_unchanged_and_can_be_chosen(opened):
    with opened("awkward") as page:
        names = page.locator("section:has(#classes) tbody th").all_inner_texts()
        assert names == [*AWKWARD, *NAMES]
        for name in AWKWARD:
            assert choose(page, "images", "class", name).count() > 0


def test_the_curves_of_a_class_replace_those_of_the_mean(opened):
    with opened("rich") as page:
        drawn = """[...document.querySelectorAll("#curve-charts path.mark")].map((path) => path.getAttribute("d"))"""
        mean = page.evaluate(drawn)
        page.locator("#curve-class").select_option("2")
        chosen = page.evaluate(drawn)
        assert len(chosen) == len(mean) == 6
        assert all(path and path != other for path, other in zip(chosen, mean))
        page.locator("#curve-class").select_option("5")  # a class without objects
        assert page.locator("#curve-empty").is_visible()
        assert not page.locator("#curve-charts").is_visible()
        page.locator("#curve-class").select_option("0")
        # Values are rounded to 1 of 1295 steps.
        for new, old in zip(page.evaluate(drawn), mean):
            pairs = zip(*(map(float, text.replace("M", " ").replace("L", " ").replace("h0", " ").split())
                          for text in (new, old)), strict=True)  # fmt: skip
            assert all(abs(a - b) < 0.25 for a, b in pairs)


def test_a_long_table_is_folded_sorted_and_searched(opened):
    with opened("many", PHONE) as page:
        section = page.locator("section:has(#classes)")
        rows = section.locator("tbody tr:visible")
        assert rows.count() == 20
        section.locator("thead button", has_text="AP").first.click()
        cells = section.locator("tbody tr:visible td:nth-child(2)")
        values = [float(text) for text in cells.all_inner_texts()]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        section.locator(".find").fill("class 77")
        assert rows.count() == 11
        section.locator(".find").fill("")
        section.locator(".unfold").click()
        assert rows.count() == 1203


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_tapped_card_is_enlarged_with_a_list_of_its_boxes(opened, viewport):
    with opened("rich", viewport) as page:
        page.locator("#image-1 .frame").click()
        viewer = page.locator("#viewer")
        assert viewer.is_visible()
        image = viewer.locator("img").bounding_box()
        assert image["width"] > 0.5 * viewport["width"]
        entries = viewer.locator(".items li")
        assert entries.count() == len(rich_report()["images"]["list"][0]["items"])
        entries.first.click()
        assert viewer.locator(".box.on").count() == 1
        page.keyboard.press("ArrowRight")
        assert viewer.locator(".name").inner_text() == "street/000002.jpg"
        page.keyboard.press("Escape")
        assert not viewer.is_visible()


def test_links_of_findings_lead_to_sections_below_the_navigation(opened):
    with opened("rich", PHONE) as page:
        page.locator(".findings a").first.click()
        page.wait_for_function("document.querySelector('nav a.here')?.hash === '#labels'")
        nav, heading = page.locator("nav").bounding_box(), page.locator("#labels").bounding_box()
        assert heading["y"] >= nav["y"] + nav["height"] - 1
