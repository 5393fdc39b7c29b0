"""No violation that axe finds: the page in every state, the API's page and reports, by day and night, large and small.

axe is the checker of Deque, a script that a page runs on itself. Here a package brings its file.
"""

import importlib.resources
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from avsep import evaluation, results, results_report
from avsep.plots import relation_map, spectrogram
from avsep.report import Report
from avsep.stft import STFT
from tests.support import chromium
from tests.support.chromium import Page
from tests.support.serving import Server, tone

PACKAGE = "axe_playwright_python"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="no axe: pip install -e '.[axe]'"),
]
WIDTHS, NIGHT = (1200, 380), (False, True)
COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}  # the rest is the same by day and night
RUN = """axe.run({resultTypes: ["violations"], ...%s}).then((found) => found.violations.map((v) =>
  `${v.id}: ${v.help}: ${v.nodes.map((n) => n.html.slice(0, 200)).join(" | ")}`))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def violations(page: Page, widths: Sequence[int] = WIDTHS) -> dict[str, list[str]]:
    """What axe holds against a page as it stands, by width and colours."""
    if not page.run("'axe' in window"):
        page.run(importlib.resources.files(PACKAGE).joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = {}
    for width, night in product(widths, NIGHT):
        page.look(width, dark=night)
        if wrong := page.run(RUN % json.dumps(COLOURS if night else {})):
            found[f"{width} px, {'dark' if night else 'light'}"] = wrong
    return found


def begin(page: Page, url: str) -> None:
    page.look(WIDTHS[0])
    page.open("about:blank#")  # so that the same address is opened anew
    page.open(url)


def test_axe_finds_what_is_wrong(page: Page, tmp_path: Path):
    """What the other tests rely on: it sees a picture without words, and letters that are too faint by night alone."""
    style = ":root { color-scheme: light dark } body { color: #333; background: light-dark(#fff, #222) }"
    (tmp_path / "bad.html").write_text(
        f"<html lang=en><title>x</title><style>{style}</style><main><h1>faint</h1><img src=x>"
    )
    begin(page, (tmp_path / "bad.html").as_uri())
    found = {look: {line.split(":")[0] for line in lines} for look, lines in violations(page).items()}
    seen = {
        f"{width} px, {light}": {what}
        for width in WIDTHS
        for light, what in (("light", "image-alt"), ("dark", "color-contrast"))
    }
    assert found == seen
    page.errors.clear()  # there is no such picture


def test_choosing_a_file(page: Page, planted: Server):
    begin(page, planted.url)
    page.wait("document.querySelector('#limits').textContent !== ''")
    assert violations(page) == {}
    page.run("for (const e of document.querySelectorAll('details')) e.open = true")
    page.run("document.querySelector('#keys-open').click()")
    assert violations(page) == {}


def test_a_file_that_is_refused(page: Page, planted: Server, tmp_path: Path):
    begin(page, planted.url)
    page.wait("document.querySelector('#limits').textContent !== ''")
    (tmp_path / "text.mp4").write_text("no media")
    page.choose_file("#file", tmp_path / "text.mp4")
    page.wait("!document.querySelector('#alert').hidden")
    assert violations(page) == {}
    page.errors.clear()  # the browser notes the answer's status


def test_a_result_mixed_corrected_and_pointed_at(page: Page, planted: Server, painted: Path):
    begin(page, planted.url)
    page.wait("document.querySelector('#limits').textContent !== ''")
    page.choose_file("#file", painted)
    page.wait("document.querySelectorAll('#seen button').length === 3 && !document.querySelector('#edit').hidden")
    assert violations(page) == {}
    page.run("document.querySelector('.solo').click()")
    page.run("document.querySelector('#seen button').focus()")
    page.run("document.querySelector('#all-rows').click()")
    page.run("document.querySelector('#edit-to').value = '_rest'")
    page.run("document.querySelector('#edit-move').click()")
    page.wait("document.querySelectorAll('#edits li').length === 1")
    assert violations(page) == {}
    assert page.errors == []


def test_the_apis_page(page: Page, planted: Server):
    begin(page, f"{planted.url}/docs")
    page.wait("document.querySelectorAll('section').length > 10")
    assert violations(page, WIDTHS[1:]) == {}  # it is long


def test_a_report_of_results(page: Page, tmp_path: Path):
    own = {figure: [5.0, 7.0] for figure in (*evaluation.FIGURES, *evaluation.GAINS)}
    figures = {"mixture": own, "default": own}
    clips = [
        evaluation.ClipResult(i, ["dog", "violin"], figures, sound_scores={"dog": 0.6, "violin": 0.4})
        for i in ("one", "two")
    ]
    report, sounds = Report("Separation of 2 duets"), Report("")
    results_report.add_results(report, results.summarize(clips), "objects")
    report.heading("Listen")
    sound = tone("dog", 1.0)
    sounds.heading("one: dog", 3)
    sounds.sounds([("dog", sound, spectrogram(sound, STFT(8000, 400, 200)))], 8000)
    report.append(sounds)
    wide = relation_map(np.eye(2), ["dog", "cat"], np.ones(2), None, ["dog"])
    for _ in range(2):  # a clip may be shown twice, and tables may begin alike
        report.image(wide, "the same relation map")
        report.table(["SDR, dB", "dog"], [("", ["mixture", "0.0"])])
    (tmp_path / "report.html").write_text(report.html())
    check_report(page, tmp_path / "report.html")


@pytest.mark.skipif("AVSEP_DEMO" not in os.environ, reason="AVSEP_DEMO names no demo's folder")
@pytest.mark.parametrize("name", ["report.html", "results/report.html"])
def test_the_demos_reports(page: Page, name: str):
    check_report(page, Path(os.environ["AVSEP_DEMO"], name))


def check_report(page: Page, file: Path) -> None:
    begin(page, file.resolve().as_uri())
    page.run("for (const e of document.querySelectorAll('details')) e.open = true")
    assert violations(page) == {}
