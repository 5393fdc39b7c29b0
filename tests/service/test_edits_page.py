"""Corrections by hand in a real Chromium: by pointer, touch and keyboard, and what then sounds."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import chromium
from tests.support.chromium import Page
from tests.support.serving import serving, write_model, write_sound

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium: apt-get install chromium"),
]

# The largest sample of each sound that the mixer has.
LOUDEST = """(async () => {
  const {mixer} = await import('/static/page.js');
  return Object.fromEntries(mixer.tracks.map((t) => [t.name, Math.max(...t.buffer.getChannelData(0).map(Math.abs))]));
})()"""
OWNERS = """[...document.querySelectorAll('#grid tr[data-name]')].map((row) =>
  [row.dataset.name, [...row.cells].slice(1).map((c) => c.querySelector('.owner') ? 1 : 0)])"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"), clips_by_label={"dog": 12, "violin": 30, "cat": 9}, clips=40)
    with serving(tmp_path_factory.mktemp("service"), model) as running:
        yield running


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("media") / "duet.wav")


@pytest.fixture
def page(tmp_path, server, sound):
    with Page(tmp_path / "profile") as opened:
        opened.look(1200)
        opened.open(server.url)
        separate(opened, sound)
        yield opened
        assert opened.errors == []


def separate(page: Page, path: Path) -> None:
    page.wait("document.querySelector('#limits').textContent !== ''")
    page.choose_file("#file", path)
    page.wait("document.querySelectorAll('#grid .owner').length === 6 && !document.querySelector('#edit').hidden")
    page.wait("document.querySelector('#edits-download').href.endsWith('/edits')")


def owners(page: Page) -> dict[str, list[int]]:
    return dict(page.run(OWNERS))


def corrections(page: Page) -> list[str]:
    return page.run("[...document.querySelectorAll('#edits li')].map((li) => li.firstChild.textContent)")


def said(page: Page, words: str) -> None:
    page.wait(f"document.querySelector('#edit-line').textContent.includes({json.dumps(words)})")
    page.wait("!document.querySelector('#edit').hasAttribute('aria-busy')")


def middle(page: Page, row: str, column: int, scroll: bool = True) -> tuple[float, float]:
    cell = f"document.querySelector('#grid tr[data-name={row}]').cells[{column + 1}]"
    if scroll:
        page.run(f"{cell}.scrollIntoView({{block: 'center'}})")
    x, y = page.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({cell}.getBoundingClientRect())")
    return x, y


def mouse(page: Page, kind: str, at: tuple[float, float]) -> None:
    page.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", buttons=1, clickCount=1)


def drag(page: Page, column: int, row: str, to: str) -> None:
    start, end = middle(page, row, column), middle(page, to, column, scroll=False)
    mouse(page, "mousePressed", start)
    for step in range(1, 5):
        mouse(page, "mouseMoved", (start[0], start[1] + (end[1] - start[1]) * step / 4))
    assert page.run("document.querySelector('#grid .target').dataset.name") == to
    mouse(page, "mouseReleased", end)


def test_a_basis_is_dragged_to_another_object_and_its_sound_with_it(page: Page):
    before, loud = owners(page), page.run(LOUDEST)
    assert list(before) == ["dog", "violin", "noise"] and loud["dog"] > 0.2 and loud["violin"] > 0.2
    own = [column for column, here in enumerate(before["dog"]) if here]
    for column in own:
        drag(page, column, "dog", "violin")
        said(page, f"Basis {column + 1} now goes to violin.")
    assert owners(page)["violin"] == [1] * 6 and len(corrections(page)) == len(own)
    after = page.run(LOUDEST)
    assert after.get("dog", 0) < 0.3 * loud["dog"] and after["violin"] > loud["violin"] + 0.1
    assert page.run("document.querySelector('#grid .target')") is None
    drag(page, own[0], "violin", "noise")  # the rest
    said(page, "now goes to the rest")
    assert page.run(LOUDEST)["_rest"] > 0.01
    page.click("#edits-undo")
    said(page, "Undid all")
    assert owners(page) == before and corrections(page) == []
    assert page.run(LOUDEST) == pytest.approx(loud, abs=0.03)  # small ones, first


def test_a_press_that_hardly_moves_plays_the_basis(page: Page):
    at = middle(page, "dog", 0)
    mouse(page, "mousePressed", at)
    mouse(page, "mouseMoved", (at[0] + 3, at[1] + 2))
    mouse(page, "mouseReleased", (at[0] + 3, at[1] + 2))
    page.wait("document.querySelector('#basis-line').textContent.startsWith('Playing basis 1')")
    assert corrections(page) == []


def test_touch_drags_too(page: Page):
    page.look(400, 800)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    column = owners(page)["dog"].index(1)
    start, end = middle(page, "dog", column), middle(page, "violin", column, scroll=False)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

    touch("touchStart", start)
    for step in range(1, 6):
        touch("touchMove", (start[0], start[1] + (end[1] - start[1]) * step / 5))
    touch("touchEnd")
    said(page, f"Basis {column + 1} now goes to violin.")
    assert page.run("document.documentElement.scrollWidth") <= 400
    small = "[...document.querySelectorAll('#edit button, #edit a')].filter(b => b.offsetHeight && b.offsetHeight < 24)"
    assert page.run(f"{small}.length") == 0


def test_the_keyboard_moves_a_basis_and_keeps_its_place(page: Page):
    column = owners(page)["dog"].index(1)
    cell = f"document.querySelector('#grid tr[data-name=dog]').cells[{column + 1}].querySelector('button')"
    page.run(f"{cell}.focus()")
    for modifiers, name in ((1, "ArrowDown"),):
        for kind in ("keyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=40, modifiers=modifiers
            )
    said(page, f"Basis {column + 1} now goes to violin.")
    label = page.run("document.activeElement.getAttribute('aria-label')")
    assert label.startswith(f"Basis {column + 1}, violin") and label.endswith("Its sound goes here")
    page.run(
        f"document.querySelector('#edit-basis').value = {column}; document.querySelector('#edit-to').value = '_rest'"
    )
    page.run("document.querySelector('#edit-move').focus()")
    page.key("Enter")
    said(page, "now goes to the rest")
    assert owners(page)["noise"][column] == 1
    page.run("document.querySelector('#edits button').focus()")
    page.key("Enter")
    said(page, "Undone")
    assert corrections(page) == [] and page.run("document.activeElement.id") == "edit-title"


def choose(page: Page, **values: Any) -> None:
    for name, value in values.items():
        selector = f"#edit-{name.replace('_', '-')}"
        page.run(f"(e => {{ e.value = {json.dumps(value)}; e.onchange?.(); }})(document.querySelector('{selector}'))")


def test_objects_and_spans_and_mixer_settings(page: Page):
    page.click("[aria-label='Mute dog']")
    choose(page, object="cat")
    page.click("#edit-add")
    said(page, "Added cat")
    tracks = page.run("[...document.querySelectorAll('.track h3')].map((h) => h.textContent)")
    assert tracks == ["violin", "dog", "cat", "the rest"]
    assert page.run("document.querySelector(\"[aria-label='Mute dog']\").getAttribute('aria-pressed')") == "true"
    assert page.run("document.querySelector('#edit-add').disabled")
    choose(page, start="1", end="4", span_object="violin", present="false")
    page.click("#edit-span button")
    said(page, "violin is silent there")
    page.click("#edit-remove")
    said(page, "Took cat away")
    assert corrections(page) == ["violin is silent from 1 to 4 s"]
    choose(page, start="3", end="2")
    page.click("#edit-span button")
    page.wait("document.querySelector('#alert').textContent.includes('it must start at 0 or later')")
    assert corrections(page) == ["violin is silent from 1 to 4 s"]
    page.errors.clear()  # the browser notes the 422
    quiet = page.run("""(async () => {
      const {mixer} = await import('/static/page.js');
      const {buffer} = mixer.tracks.find((t) => t.name === 'violin');
      const [start, end] = [1.2, 3.8].map((seconds) => seconds * buffer.sampleRate);
      return Math.max(...buffer.getChannelData(0).slice(start, end).map(Math.abs));
    })()""")
    assert quiet < 1e-5


def test_downloaded_corrections_are_made_on_the_next_upload(page: Page, server, sound, tmp_path):
    column = owners(page)["dog"].index(1)
    drag(page, column, "dog", "violin")
    said(page, "now goes to violin")
    url = page.run("document.querySelector('#edits-download').href")
    (tmp_path / "edits.json").write_bytes(server.client.get(url).content)
    page.click("#again")
    page.run("document.querySelector('#options').open = true")
    page.choose_file("#edits-file", tmp_path / "edits.json")
    page.choose_file("#file", sound)
    page.wait("document.querySelector('#edit-line').textContent === 'Made the corrections of edits.json.'")
    assert corrections(page) == [f"basis {column + 1} goes to violin"] and url not in page.run("location.href")
    page.call("Page.reload")  # they are there again
    page.wait("document.querySelectorAll('#edits li').length === 1")


def test_every_control_has_a_name_and_typing_is_not_mixing(page: Page):
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "spinbutton", "link", "textbox"}
    controls = [n for n in tree if n.get("role", {}).get("value") in roles and not n.get("ignored")]
    assert len(controls) > 15
    assert not [n for n in controls if not n.get("name", {}).get("value", "").strip()]
    page.run("(e => { e.value = ''; e.focus(); })(document.querySelector('#edit-end'))")
    page.key("2")
    time.sleep(0.1)
    assert page.run("document.activeElement.id") == "edit-end" and page.run("document.activeElement.value") == "2"


def test_a_result_of_two_stems_is_corrected(tmp_path, server, sound):
    with Page(tmp_path / "profile") as opened:
        opened.look(1200)
        opened.open(server.url)
        opened.wait("document.querySelector('#two-stems option[value=dog]') !== null")
        opened.run("document.querySelector('#two-stems').value = 'dog'")
        separate(opened, sound)
        assert list(opened.run(LOUDEST)) == ["dog", "_rest"]
        opened.run("document.querySelector('#edit-to').value = '_rest'")
        opened.run("document.querySelector('#edit-move').click()")
        said(opened, "now goes to the rest")
        assert list(opened.run(LOUDEST)) == ["dog", "_rest"]
        assert opened.errors == []
