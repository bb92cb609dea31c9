"""The report is one file that shows the right case, needs no network, and takes names and errors for text."""

import base64
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from shapes import ellipsoid, empty, make_grid

from ich_pipeline import html_report
from ich_pipeline.html_report import FLAG_WORDS, MAX_PICTURE_BYTES, write_html
from ich_pipeline.overlap import compare_masks
from ich_pipeline.reading import read_scan
from ich_pipeline.records import NativeMask
from ich_pipeline.report import CaseRow, write_agreement, write_tables
from ich_pipeline.run_report import RunReport
from ich_pipeline.volumetry import measure

GRID = make_grid((60, 60, 12), (1, 1, 5))
CLEAN = empty(GRID)
MASKS = {
    "small": ellipsoid(GRID, (6, 5, 8)),
    "big": ellipsoid(GRID, (20, 16, 22)),
    "middle": ellipsoid(GRID, (12, 9, 12)),
}
COLOURS = {"small": (200, 40, 40), "big": (40, 60, 200), "middle": (40, 160, 60)}
HOSTILE = 'bad </script></template><b onclick="x">\'&'


def batch(folder: Path, masks: dict[str, NativeMask] = MASKS, **changes: Any) -> Path:
    """A finished batch: three cases with pictures of one colour each, and one that failed. Returns its table."""
    rows = [
        CaseRow(
            name,
            "ok",
            flags=("gantry_tilt", "odd_flag") if name == "middle" else (),
            image=folder.parent / "scans" / f"{name}.nii.gz",
            mask=folder / "masks" / f"{name}.nii.gz",
            report=measure(name, mask),
            seconds=1.5,
            bundle="cascade3d",
            weights_sha256="ab12" * 16,
        )
        for name, mask in masks.items()
    ]
    rows.insert(1, CaseRow(HOSTILE, "failed", f"{HOSTILE}: no HU <i>", image=folder.parent / "scans" / "bad.nii"))
    table = folder / "volumes.csv"
    write_tables(table, [dataclasses.replace(row, **changes) if row.report else row for row in rows])
    (folder / "pictures").mkdir()
    for name in masks:
        Image.new("RGB", (256, 208), COLOURS[name]).save(folder / "pictures" / f"{name}.png")
    config = {"run": {"out": str(folder), "run_name": "</script><b>"}, "inference": {"threshold": 0.5}}
    report = RunReport(
        config, command=["/opt/bin/ich-pipeline", "segment", str(folder.parent), f"bundle={folder}", "x=</script>"]
    )
    report.bundle = {"name": "cascade3d", "version": "0.1.0", "sha256": "ab12" * 16}
    with report.stage("network", "small"):
        pass
    for row in rows:
        report.add_case(row.case_id, row.status, error=row.error or None)
    report.write(folder / "run.json", exit_status=1)
    return table


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text in each row of the table of cases."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr" and "data-case" in dict(attrs):
            self.rows.append([])
        if tag == "template":
            self.in_cell = False
        if tag == "td" and self.rows and "data-v" in dict(attrs):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_html(batch(tmp_path_factory.mktemp("site") / "out")))


def jpeg(uri: str | None) -> bytes:
    head, _, data = (uri or "").partition(",")
    assert head == "data:image/jpeg;base64"
    return base64.b64decode(data, validate=True)


def pictures(page: Page) -> list[Image.Image]:
    shown = [attrs["src"] for attrs in page.all("img") if (attrs["alt"] or "").startswith("Axial slices")]
    return [Image.open(BytesIO(jpeg(uri))) for uri in shown]


# ---------------------------------------------------------------- what it shows


def test_every_case_has_its_row(page: Page) -> None:
    assert [attrs["data-case"] for attrs in page.all("tr") if "data-case" in attrs] == [
        "small",
        HOSTILE,
        "big",
        "middle",
    ]
    small, failed, big, middle = ([cell.strip() for cell in row] for row in page.rows)
    report = measure("big", MASKS["big"])
    assert big[:4] == [
        "big",
        "ok",
        f"{report.volume_ml:.2f}",
        f"{report.volume_low_ml:.1f}–{report.volume_high_ml:.1f}",
    ]
    assert failed[0] == HOSTILE + f"{HOSTILE}: no HU <i>"
    assert failed[1:] == ["failed", *[""] * (len(big) - 2)]
    assert middle[-1] == "gantry_tiltodd_flag"
    assert "Dice" not in page.text
    assert len(small) == len(big)
    for words in ("Research use only", FLAG_WORDS["gantry_tilt"], "cascade3d", "ab12" * 16, "threshold", "nibabel"):
        assert words in page.text


def test_every_case_has_its_own_picture_and_numbers(page: Page) -> None:
    found = [picture.getpixel((128, 104)) for picture in pictures(page)]
    assert np.abs(np.array(found) - np.array(list(COLOURS.values()))).max() <= 3
    assert len(page.all("template")) == 4
    for name, mask in MASKS.items():
        assert f"masks/{name}.nii.gz" in page.text
        assert f"{measure(name, mask).tada_ml:.3f}" in page.text


def test_names_and_errors_are_text(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert len(page.all("template")) == 4
    assert not page.all("b")
    assert not page.all("i")
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.all("a")[1]["href"] == f"#case={quote(HOSTILE)}"


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    links = [
        attrs[name] or "" for _, attrs in page.elements for name in ("src", "href", "srcset", "action") if name in attrs
    ]
    assert len(links) > 7
    assert [link for link in links if not link.startswith(("data:image/", "#"))] == []
    assert not re.search(r"://|@import|url\(|fetch\(|XMLHttp|import\(", page.source)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.elements}
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs) or ""
    assert policy.startswith("default-src 'none';")
    assert "img-src data:;" in policy
    assert "connect-src" not in policy


def test_paths_are_those_of_the_table(tmp_path: Path) -> None:
    page = Page(write_html(batch(tmp_path / "out")))
    assert str(tmp_path) in (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in page.source
    assert "../scans/big.nii.gz" in page.text
    assert "ich-pipeline segment (path withheld) bundle=(path withheld) x=</script>" in page.text


def test_every_flag_of_reading_has_words() -> None:
    named = set(re.findall(r"`(\w+)`", (read_scan.__doc__ or "").partition("flag")[2]))
    assert len(named) > 6
    assert named | {"phantom_weights"} <= set(FLAG_WORDS)


def test_rules_are_plotted_when_there_is_something_to_compare(page: Page, tmp_path: Path) -> None:
    assert [attrs["alt"] for attrs in page.all("img") if "against" in (attrs["alt"] or "")] == [
        "ABC/2 against voxels of the same mask",
        "ABC/2 with Kothari's weights against voxels of the same mask",
    ]
    alone = Page(write_html(batch(tmp_path / "out", {"small": MASKS["small"], "big": CLEAN})))
    assert "Plots" not in alone.text


# ---------------------------------------------------------------- what is missing, and what belongs to something else


def test_a_table_is_enough(tmp_path: Path) -> None:
    table = batch(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pictures")
    for name in ("run.json", "lesions.csv"):
        (tmp_path / "out" / name).unlink()
    write_tables(table, [CaseRow("later", "skipped"), CaseRow("clean", "ok", report=measure("clean", CLEAN))])
    (tmp_path / "out" / "lesions.csv").unlink()
    page = Page(write_html(table, tmp_path / "elsewhere.html"))
    assert [row[0].strip() for row in page.rows] == ["later", "clean"]
    assert "There is no run.json" in page.text
    assert page.text.count("No picture.") == 2
    write_tables(table, [])
    assert Page(write_html(table)).rows == []


def test_pictures_of_other_things_are_not_shown(tmp_path: Path) -> None:
    table = batch(tmp_path / "masks", bundle="")  # measured from masks, beside the pictures of an earlier run
    assert pictures(Page(write_html(table))) == []
    table = batch(tmp_path / "failed")
    write_tables(table, [CaseRow("big", "failed", "big: broken")])
    assert pictures(Page(write_html(table))) == []


def test_a_picture_that_cannot_be_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = batch(tmp_path / "out")
    (tmp_path / "out" / "pictures" / "big.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        assert len(pictures(Page(write_html(table)))) == 2
    assert "big.png cannot be shown" in caplog.text


def test_scores_are_shown_where_they_are_of_these_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = batch(tmp_path / "out")
    label = ellipsoid(GRID, (18, 16, 22))
    scored = [compare_masks(name, mask, label, patient_id="DOE^JANE") for name, mask in MASKS.items()]
    write_agreement(tmp_path / "out" / "evaluation.csv", scored)
    (tmp_path / "out" / "evaluation.md").write_text("| dice | <b> |")
    Image.new("L", (8, 8)).save(tmp_path / "out" / "scatter.png")
    page = Page(write_html(table))
    assert {f"{row.dice:.3f}" for row in scored} <= {cell for row in page.rows for cell in row}
    assert f"{scored[1].error_ml:.2f}" in page.rows[2]
    assert "Against the label" in page.text
    assert "| dice | <b> |" in page.text
    assert page.all("img")[0]["alt"] == "Predicted against reference volume"
    assert "DOE" not in page.source

    write_agreement(tmp_path / "out" / "evaluation.csv", [dataclasses.replace(scored[0], pred_ml=99.0), *scored[1:]])
    page = Page(write_html(table))
    assert "Dice" not in page.text
    assert "Predicted against reference volume" not in page.text
    assert "scores another mask" in caplog.text


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = batch(tmp_path / "out")
    before = write_html(table).read_bytes()

    def broken(file: Path | None) -> str:
        raise MemoryError("in the middle")

    monkeypatch.setattr(html_report, "_picture", broken)
    with pytest.raises(MemoryError):
        write_html(table)
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("noise", "first_quality_does"), [(8, True), (22, False)])
def test_a_picture_is_small_and_its_outlines_are_sharp(tmp_path: Path, noise: int, first_quality_does: bool) -> None:
    grey = np.random.default_rng(0).normal(110, noise, (832, 1024, 1)).clip(0, 255).astype(np.uint8).repeat(3, axis=2)
    grey[:64] = 0
    red = np.zeros(grey.shape[:2], bool)
    red[300:500, [400, 600]] = red[[300, 500], 400:600] = True  # one pixel wide
    grey[red] = (255, 92, 72)
    Image.fromarray(grey).save(tmp_path / "x.png")
    data = jpeg(html_report._picture(tmp_path / "x.png"))
    assert len(data) <= MAX_PICTURE_BYTES
    first = BytesIO()
    Image.fromarray(grey).save(first, "JPEG", quality=html_report.QUALITIES[0], subsampling=0, optimize=True)
    assert (first.tell() <= MAX_PICTURE_BYTES) == first_quality_does
    shown = np.asarray(Image.open(BytesIO(data)), dtype=float)
    assert shown.shape == grey.shape
    redness = shown[..., 0] - shown[..., 1]
    # With half the colour resolution half of the red would be on the pixels beside the line.
    assert redness[350:450, 400].mean() > 2.5 * redness[350:450, [398, 402]].mean()
    assert redness[350:450, 400].mean() > 90


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(batch(tmp_path_factory.mktemp("browser") / "out"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, service = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and service):
        pytest.skip("no chromium with chromedriver; `make browser` installs them on Debian")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    words = (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1400,1000"),
    )
    for word in (*words, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any, site: Path) -> Iterator[Any]:
    """A browser with the report open; after the test its log holds no error, and it has asked for nothing else."""
    chromium.get("about:blank")
    requests(chromium)  # of the browser's own first page
    chromium.get(site.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    asked = requests(chromium)
    assert site.as_uri() in asked
    assert {url for url in asked if not url.startswith((site.as_uri(), "data:image/"))} == set()


def requests(browser: Any) -> set[str]:
    """What the browser has asked for since it was last asked."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}


def element(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def shown_cases(browser: Any) -> list[str]:
    rows = browser.find_elements("css selector", "#cases tbody tr")
    return [row.get_attribute("data-case") for row in rows if row.is_displayed()]


def wait_for(browser: Any, condition: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {condition}"))


def open_case(browser: Any) -> str:
    """Id of the case in the panel, or nothing."""
    return element(browser, "#name").text if element(browser, "dialog").is_displayed() else ""


def wait_for_case(browser: Any, case_id: str) -> None:
    wait_for(browser, f"document.querySelector('dialog').open && $('#name').textContent === {json.dumps(case_id)}")


def wait_for_table(browser: Any) -> None:
    wait_for(browser, "!document.querySelector('dialog').open && !location.hash")


def press(browser: Any, key: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(getattr(Keys, key))


def picture_colour(browser: Any) -> np.ndarray:
    """Colour in the middle of the panel's picture, as the browser decoded it."""
    wait_for(browser, "$('#case img').complete && $('#case img').naturalWidth > 0")
    return np.array(
        browser.execute_script("""
            const image = document.querySelector("#case img"), canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data].slice(0, 3);
        """)
    )


@pytest.mark.browser
class TestInABrowser:
    @pytest.mark.parametrize("name", list(MASKS))
    def test_a_click_on_a_row_opens_that_case(self, browser: Any, name: str) -> None:
        row = next(
            row
            for row in browser.find_elements("css selector", "#cases tbody tr")
            if row.get_attribute("data-case") == name
        )
        row.find_elements("css selector", "td")[2].click()
        wait_for_case(browser, name)
        text = element(browser, "#case").text
        report = measure(name, MASKS[name])
        for number in (report.volume_ml, report.tada_ml, report.a_mm):
            assert f"{number:.3f}" in text
        assert f"masks/{name}.nii.gz" in text
        assert ("The gantry was tilted" in text) == (name == "middle")
        assert np.abs(picture_colour(browser) - COLOURS[name]).max() <= 6
        lesion = [cell.text for cell in browser.find_elements("css selector", "#case tbody tr:first-child td")]
        assert lesion[:2] == ["1", f"{report.volume_ml:.2f}"]

    def test_the_second_row_opens_after_sorting_too(self, browser: Any) -> None:
        head = element(browser, "#cases th:nth-child(3)")
        head.find_element("css selector", "button").click()
        assert shown_cases(browser) == ["big", "middle", "small", HOSTILE]
        assert head.get_attribute("aria-sort") == "descending"
        element(browser, "#cases tbody tr:nth-child(2) td:nth-child(3)").click()
        wait_for_case(browser, "middle")
        assert np.abs(picture_colour(browser) - COLOURS["middle"]).max() <= 6
        press(browser, "ESCAPE")
        wait_for_table(browser)
        head.find_element("css selector", "button").send_keys("\n")  # by keyboard, the other way round
        assert shown_cases(browser) == ["small", "middle", "big", HOSTILE], "what has no number stays last"
        assert head.get_attribute("aria-sort") == "ascending"
        element(browser, "#cases th:first-child button").click()
        assert shown_cases(browser) == [HOSTILE, "big", "middle", "small"]
        assert head.get_attribute("aria-sort") == "none"

    def test_keys_go_through_the_cases_and_close(self, browser: Any) -> None:
        element(browser, "#cases tbody tr:nth-child(3) a").send_keys("\n")
        wait_for_case(browser, "big")
        press(browser, "ARROW_LEFT")
        wait_for_case(browser, HOSTILE)
        text = element(browser, "#case").text
        assert f"{HOSTILE}: no HU <i>" in text
        assert "No picture." in text
        assert not browser.find_elements("css selector", "#case img, #case b, #case i")
        press(browser, "ARROW_RIGHT")
        press(browser, "ARROW_RIGHT")
        wait_for_case(browser, "middle")
        press(browser, "ARROW_RIGHT")  # the last one
        assert open_case(browser) == "middle"
        press(browser, "ESCAPE")
        wait_for_table(browser)
        assert open_case(browser) == ""
        assert browser.switch_to.active_element.text == "middle"

    def test_the_filter_knows_cases_states_and_flags(self, browser: Any) -> None:
        box = element(browser, "#filter")
        for words, cases in (
            ("failed", [HOSTILE]),
            ("TILT", ["middle"]),
            ("ok mid", ["middle"]),
            ("nothing", []),
            ("b", [HOSTILE, "big"]),
        ):
            box.clear()
            box.send_keys(words)
            assert shown_cases(browser) == cases
            assert element(browser, "#shown").text == f"{len(cases)} of 4"
        element(browser, "#cases tbody tr:nth-child(3) td:nth-child(3)").click()
        wait_for_case(browser, "big")
        assert element(browser, "#place").text == "ok, 2 of 2"
        press(browser, "ARROW_LEFT")
        wait_for_case(browser, HOSTILE)

    def test_a_link_opens_its_case(self, browser: Any, site: Path) -> None:
        browser.get("about:blank")
        browser.get(f"{site.as_uri()}#case={quote(HOSTILE)}")
        wait_for_case(browser, HOSTILE)
        browser.execute_script("location.hash = '#case=big'")
        wait_for_case(browser, "big")
        assert np.abs(picture_colour(browser) - COLOURS["big"]).max() <= 6
        element(browser, "#close").click()
        wait_for_table(browser)
        for nonsense in ("#case=nobody", "#case=%E0%A4%A", "#x"):
            browser.get("about:blank")
            browser.get(f"{site.as_uri()}{nonsense}")
            assert open_case(browser) == ""
            assert len(shown_cases(browser)) == 4

    def test_a_page_that_asked_for_more_would_be_seen(self, browser: Any, site: Path) -> None:
        browser.execute_script("document.body.append(Object.assign(new Image(), {src: 'file:///nothing.png'}))")
        wait_for(browser, "document.body.lastChild.complete")
        assert "Content Security Policy" in browser.get_log("browser")[0]["message"]
        assert "file:///nothing.png" in requests(browser)
        browser.get(site.as_uri())
