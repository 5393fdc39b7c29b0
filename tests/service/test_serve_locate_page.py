"""Objects in the page's picture, in a real Chromium: pointed at, clicked, touched, and chosen by keyboard."""

import json

import pytest

from tests.support import chromium
from tests.support.chromium import Page
from tests.support.planted import BOXES
from tests.support.serving import wait

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture
def page(tmp_path, planted, painted):
    with Page(tmp_path / "profile") as opened:
        opened.look(1200)
        opened.open(planted.url)
        opened.choose_file("#file", painted)
        opened.wait("document.querySelectorAll('#seen button').length === 3")
        opened.wait("document.querySelector('#video').videoWidth === 160")
        yield opened
        assert opened.errors == []


def at(page: Page, name: str) -> tuple[float, float]:
    """The middle of an object on the screen."""
    left, top, right, bottom = BOXES[name]
    page.run("document.querySelector('#places').scrollIntoView({block: 'center'})")
    x, y, width, height = page.run(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('#places').getBoundingClientRect())"
    )
    return x + width * (left + right) / 2, y + height * (top + bottom) / 2  # both are 4:3


def mouse(page: Page, kind: str, where: tuple[float, float]) -> None:
    button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], **button)


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def soloed(page: Page) -> list[str]:
    return page.run(
        "(async () => (await import('/static/page.js')).mixer.tracks.filter(t => t.solo).map(t => t.name))()"
    )


@pytest.mark.parametrize("name", ["dog", "violin"])
def test_pointing_names_an_object_and_a_click_solos_it(page: Page, name: str):
    where = at(page, name)
    mouse(page, "mouseMoved", where)
    wait(lambda: text(page, "#place-name") == name)
    assert page.run("document.querySelector('#place-box').checkVisibility()") and soloed(page) == []
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, where)
    assert soloed(page) == [name] and text(page, "#places-said") == f"You hear {name} alone."
    pressed = page.run("[...document.querySelectorAll('#seen button[aria-pressed=true]')].map(b => b.value)")
    assert pressed == [name]
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, where)
    assert soloed(page) == [] and text(page, "#places-said") == "You hear everything again."
    mouse(page, "mouseMoved", (5, 5))
    wait(lambda: page.run("document.querySelector('#place').hidden"))


def test_another_object_takes_the_first_ones_place_also_while_it_plays(page: Page):
    page.click("#play")
    for name in ("dog", "violin"):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            mouse(page, kind, at(page, name))
        assert soloed(page) == [name]
    page.click("[aria-label='Solo violin']")
    assert page.run("document.querySelectorAll('#seen button[aria-pressed=true]').length") == 0


def test_what_is_visible_and_silent_says_so(page: Page):
    where = at(page, "cat")
    mouse(page, "mouseMoved", where)
    wait(lambda: text(page, "#place-name") == "cat – visible, silent")
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, where)
    assert soloed(page) == [] and text(page, "#places-said") == "cat – visible, silent: there is nothing to hear."


def test_touch_solos(page: Page):
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = at(page, "dog")
    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    wait(lambda: soloed(page) == ["dog"])
    assert text(page, "#place-name") == "dog" and page.run("document.querySelector('#place-box').checkVisibility()")


def test_the_keyboard_does_the_same(page: Page):
    page.run("document.querySelector('#source input').focus()")
    page.key("Tab")
    names = page.run("[...document.querySelectorAll('#seen button')].map(b => b.value)")
    assert page.run("document.activeElement.value") == names[0]
    assert text(page, "#place-name").startswith(names[0])
    position = page.run("(async () => (await import('/static/page.js')).mixer.position)()")
    while page.run("document.activeElement.value") != "violin":
        before = page.run("document.activeElement.value")
        page.key("ArrowRight")
        assert page.run("document.activeElement.value") != before
    assert text(page, "#place-name") == "violin"
    page.key("Enter")
    assert soloed(page) == ["violin"]
    assert (
        page.run("(async () => (await import('/static/page.js')).mixer.position)()") == position
    )  # arrows didn't seek
    page.key("Tab")
    assert page.run("document.activeElement.closest('#seen')") is None  # one stop for all


def test_it_goes_with_the_result(page: Page):
    page.click("#again")
    page.wait("!document.querySelector('#choose').hidden")
    assert page.run("document.querySelectorAll('#seen button').length") == 0


def test_after_a_reload_the_still_picture_is_pointed_at(page: Page):
    page.run("location.reload()")
    page.wait(
        "document.querySelectorAll('#seen button').length === 3 && document.querySelector('#still').naturalWidth > 0"
    )
    mouse(page, "mouseMoved", at(page, "dog"))
    wait(lambda: text(page, "#place-name") == "dog")
