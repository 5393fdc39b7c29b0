"""The page in a real Chromium: upload, wait, play, mute, and what then sounds."""

from pathlib import Path

import chromium
import pytest
from chromium import Page
from serving import PITCH, serving, write_model, write_sound, write_video

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium: apt-get install chromium"),
]

# How loud the analyser finds each pitch, in dB, at best over a second.
LISTEN = """(async () => {
  const {mixer} = await import('/static/page.js');
  mixer.analyser.fftSize = 4096;
  mixer.analyser.smoothingTimeConstant = 0;
  const bins = new Float32Array(mixer.analyser.frequencyBinCount);
  const best = PITCHES.map(() => -200);
  await new Promise(r => setTimeout(r, 700));  // what was playing has left the analyser
  for (const end = performance.now() + 1500; performance.now() < end; await new Promise(r => setTimeout(r, 20))) {
    mixer.analyser.getFloatFrequencyData(bins);
    PITCHES.forEach((hz, i) => {
      const k = Math.round(hz * 4096 / mixer.context.sampleRate);
      best[i] = Math.max(best[i], ...bins.slice(k - 3, k + 4));
    });
    if (!mixer.playing && !mixer.alone) break;
  }
  return best;
})()""".replace("PITCHES", str(list(PITCH.values())))
MIXER = "(async () => { const {mixer} = await import('/static/page.js'); return %s; })()"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    with serving(tmp_path_factory.mktemp("service"), model, max_upload_bytes=3_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "duet.mp4", 20.0)


@pytest.fixture
def page(tmp_path, server):
    with Page(tmp_path / "profile") as opened:
        opened.look(1200)
        opened.open(server.url)
        yield opened
        assert opened.errors == []


def separate(page: Page, path: Path) -> None:
    page.choose_file("#file", path)
    page.wait("!document.querySelector('#result').hidden")
    page.wait("document.querySelectorAll('#grid button').length > 0")


def track(name: str, selector: str) -> str:
    """A control of one sound."""
    return f"[aria-label='{selector} {name}']"


def test_muting_an_object_takes_its_sound_away(page: Page, video):
    separate(page, video)
    names = page.run("[...document.querySelectorAll('.track h3')].map(h => h.textContent)")
    shares = page.run("[...document.querySelectorAll('.track .hint')].map(p => parseInt(p.textContent))")
    assert names == ["violin", "dog", "the rest"] and shares[0] > shares[1]  # the loudest first
    page.click("#play")
    page.wait(MIXER % "mixer.playing")
    dog, violin = page.run(LISTEN)
    assert min(dog, violin) > -40
    page.click(track("dog", "Mute"))
    assert page.run("document.querySelector(\"[aria-label='Mute dog']\").getAttribute('aria-pressed')") == "true"
    muted = page.run(LISTEN)
    assert muted[0] < dog - 15 and abs(muted[1] - violin) < 3
    page.click(track("dog", "Solo"))  # mute wins, so nothing is left
    assert max(page.run(LISTEN)) < min(dog, violin) - 15
    page.click(track("dog", "Mute"))
    alone = page.run(LISTEN)
    assert abs(alone[0] - dog) < 3 and alone[1] < violin - 15
    page.click("#source label:nth-of-type(2)")
    original = page.run(LISTEN)
    assert abs(original[0] - dog) < 3 and abs(original[1] - violin) < 3
    page.click("#play")
    page.wait(MIXER % "!mixer.playing")


def test_a_fader_sets_a_level(page: Page, video):
    separate(page, video)
    page.click("#play")
    page.click(track("dog", "Solo"))
    dog, _ = page.run(LISTEN)
    page.run("(f => { f.value = -20; f.oninput(); })(document.querySelectorAll('.track .fader input')[1])")
    assert page.run(LISTEN)[0] == pytest.approx(dog - 20, abs=3)


def test_the_picture_keeps_up_with_the_sound(page: Page, video):
    separate(page, video)
    page.wait("document.querySelector('#video').videoWidth === 160")
    page.click("#play")
    difference = MIXER % "Math.abs(mixer.position - document.querySelector('#video').currentTime)"
    page.wait(MIXER % "mixer.position > 1.5")
    assert page.run(difference) < 0.25
    page.click(".views")  # seeks to its middle
    page.wait(MIXER % "mixer.position > 9.5")
    page.wait(MIXER % "mixer.position > 11")
    assert page.run(difference) < 0.25
    page.click("#play")
    page.wait("document.querySelector('#video').paused")


def test_a_cell_of_the_relation_map_plays_its_basis_alone(page: Page, video):
    separate(page, video)
    rows = page.run("[...document.querySelectorAll('#grid th.audible')].map(h => h.textContent)")
    assert rows == ["dog", "violin"]
    page.run("document.querySelector('#all-rows').click()")
    assert page.run("document.querySelectorAll('#grid button').length") == 24 * 6
    page.run("document.querySelector('#all-rows').click()")
    # the surest cell of the first row, which is dog
    page.run(
        "[...document.querySelectorAll('#grid tr:nth-child(2) button')]"
        ".sort((a, b) => b.style.getPropertyValue('--p') - a.style.getPropertyValue('--p'))[0].id = 'surest'"
    )
    page.click("#surest")
    page.wait(MIXER % "Boolean(mixer.alone)")
    dog, violin = page.run(LISTEN)
    assert dog > violin + 15
    assert "basis" in page.run("document.querySelector('#basis-line').textContent")
    page.click("#surest")
    page.wait(MIXER % "!mixer.alone")


def test_it_can_be_used_by_keyboard(page: Page, video):
    separate(page, video)
    assert page.run("document.activeElement.id") == "result-title"
    page.key("Tab")
    assert page.run("document.activeElement.id") == "play"
    page.key("Enter")
    page.wait(MIXER % "mixer.playing")
    names = []
    for _ in range(40):
        page.key("Tab")
        name = "e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
        names.append(page.run(f"(e => {name})(document.activeElement)"))
    order = [
        "Position",
        "Mute violin",
        "Solo violin",
        "Mute dog",
        "Mute the rest",
        "Download all (ZIP)",
        "Delete this result",
    ]
    found = [next(i for i, n in enumerate(names) if n.strip().startswith(o)) for o in order]
    assert found == sorted(found)
    assert any(n.startswith("Level of dog") for n in names)
    page.run("document.querySelector('#grid button[tabindex=\"0\"]').focus()")
    for key in ("ArrowRight", "ArrowDown"):
        page.key(key)
    assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Basis 2, violin")
    page.key("Enter")
    page.wait(MIXER % "Boolean(mixer.alone)")


def test_every_control_has_a_name(page: Page, video):
    separate(page, video)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "link", "checkbox", "radio", "combobox"}
    controls = [n for n in tree if n.get("role", {}).get("value") in roles and not n.get("ignored")]
    assert len(controls) > 20
    assert not [n for n in controls if not n.get("name", {}).get("value", "").strip()]


def test_it_fits_a_phone(page: Page, video):
    page.look(360, 740)
    separate(page, video)
    assert page.run("document.documentElement.scrollWidth") <= 360
    small = page.run(
        "[...document.querySelectorAll('button, .button')].filter(b => b.offsetHeight && b.offsetHeight < 24).length"
    )
    assert small == 0


def test_a_result_is_there_again_after_a_reload_until_it_is_deleted(page: Page, video, server):
    separate(page, video)
    url = page.run("location.href")
    assert "#" in url
    page.open("about:blank#")
    page.open(url)
    page.wait("!document.querySelector('#result').hidden")
    page.wait("document.querySelectorAll('#grid button').length > 0")
    page.click("#delete")
    page.wait("!document.querySelector('#choose').hidden")
    assert server.client.get(f"/v1/separations/{url.split('#')[1]}").status_code == 404


def test_an_example_can_be_picked(page: Page):
    page.wait("!document.querySelector('#examples-box').hidden")
    page.click("#examples button")
    page.wait("!document.querySelector('#result').hidden")
    page.wait("document.querySelectorAll('#grid button').length > 0")


def test_what_goes_wrong_is_said(page: Page, tmp_path, video):
    (tmp_path / "text.mp4").write_text("no media")
    page.wait("document.querySelector('#limits').textContent !== ''")
    page.choose_file("#file", tmp_path / "text.mp4")
    page.wait("!document.querySelector('#alert').hidden")
    assert "/tmp" not in page.run("document.querySelector('#alert').textContent")
    assert not page.run("document.querySelector('#choose').hidden")
    (tmp_path / "big.mp4").write_bytes(b"x" * 3_000_001)
    page.choose_file("#file", tmp_path / "big.mp4")
    page.wait("document.querySelector('#alert').textContent.includes('3 MB')")
    separate(page, video)
    assert page.run("document.querySelector('#alert').hidden")


def test_a_token_is_asked_for(tmp_path, video):
    model = write_model(tmp_path / "model")
    with serving(tmp_path, model, token="secret") as server, Page(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("!document.querySelector('#token-form').hidden")
        page.errors.clear()  # the browser notes each 401
        page.run("document.querySelector('#token').value = 'secret'")
        page.click("#token-form button")
        page.wait("document.querySelector('#objects input') !== null")
        separate(page, video)
        assert page.errors == []


def test_sound_alone_has_no_picture(page: Page, tmp_path):
    separate(page, write_sound(tmp_path / "duet.wav"))
    page.wait("!document.querySelector('#no-picture').hidden")
