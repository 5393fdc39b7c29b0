"""The page in a real Chromium: upload, wait, play, mute, and what then sounds."""

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support import chromium
from tests.support.chromium import Page
from tests.support.serving import (
    PITCH,
    RATE,
    Bands,
    Server,
    serving,
    tone,
    wait,
    write_model,
    write_sound,
    write_video,
)
from tests.support.streams import decoded, packets, write

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
    shares = page.run(
        "[...document.querySelectorAll('.track .hint')].map(p => parseInt(p.textContent.match(/[0-9]+|$/)[0]))"
    )
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
    assert min(page.run(difference) for _ in range(5)) < 0.25  # a busy machine shows a picture late
    page.click(".views")  # seeks to its middle
    page.wait(MIXER % "mixer.position > 9.5")
    page.wait(MIXER % "mixer.position > 11")
    assert min(page.run(difference) for _ in range(5)) < 0.25  # a busy machine shows a picture late
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
    page.wait("document.querySelectorAll('#grid button').length > 0 && !document.querySelector('#edit').hidden")
    page.click("#delete")  # when nothing of it is asked for any more
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


# ------------------------------------------------------------------------- views and addresses


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory):
    model = write_model(
        tmp_path_factory.mktemp("model"), n_iter=3000, clips_by_label={"dog": 12, "violin": 30}, clips=40
    )
    with serving(tmp_path_factory.mktemp("service"), model, max_duration_s=60.0) as running:
        yield running


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("media") / "long.wav", 30.0)


@pytest.fixture
def slow_page(tmp_path, slow_server):
    with Page(tmp_path / "profile") as opened:
        opened.look(1200)
        opened.open(slow_server.url)
        opened.wait("document.querySelector('#limits').textContent !== ''")
        yield opened
        assert opened.errors == []
    wait(slow_server.idle)


def shown(part: str) -> str:
    return f"!document.querySelector('#{part}').hidden"


def text(selector: str) -> str:
    return f"document.querySelector('{selector}').innerText"


def status(server: Server, page: Page) -> str:
    return server.client.get(f"/v1/separations/{page.run('location.hash').lstrip('#')}").json()["status"]


@pytest.mark.parametrize("leave", ["#again", "#delete", "back"])
def test_what_was_left_is_left_in_peace(page: Page, video, server, leave):
    """In the first moment of a result, while it is still being drawn."""
    kept = len(server.folders())
    page.choose_file("#file", video)
    page.wait(shown("result"))
    page.run("history.back()" if leave == "back" else f"document.querySelector('{leave}').click()")
    page.wait(shown("choose"))
    time.sleep(1.5)
    assert page.run("document.querySelector('#alert').hidden") and page.run("location.hash") == ""
    assert len(server.folders()) == kept + (leave != "#delete")
    separate(page, video)  # the next one isn't disturbed


def test_a_result_that_is_left_while_its_sounds_come_stays(page: Page, video, server):
    page.choose_file("#file", video)
    page.call(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=20_000, uploadThroughput=-1
    )
    page.wait(f"{text('#stage')}.includes('sounds: ')")
    assert page.run(text("#stage")).endswith(" MB")  # bytes as progress
    url = page.run("location.href")
    page.click("#cancel")
    page.wait(shown("choose"))
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    assert server.client.get(f"/v1/separations/{url.split('#')[1]}").json()["status"] == "done"
    page.run("history.back()")
    page.open("about:blank#")
    page.open(url)
    page.wait(shown("result"))


def test_work_is_found_again_by_its_address(slow_page: Page, long, slow_server):
    page = slow_page
    page.choose_file("#file", long)
    page.wait("location.hash.length > 1")
    page.wait(shown("stay"))
    assert page.run(text("#work-title")) == "long.wav"
    page.call("Page.reload")
    page.wait(f"document.readyState === 'complete' && {shown('work')} && {shown('stay')}")
    assert page.run(text("#work-title")) == "long.wav" and status(slow_server, page) in ("queued", "running")
    page.run("history.back()")
    page.wait(shown("choose"))
    page.run("history.forward()")
    page.wait(shown("work"))
    page.wait(shown("result"), 200)
    page.run("history.back()")
    page.wait(shown("choose"))
    page.run("history.forward()")
    page.wait(shown("result"))
    page.click("#again")
    page.wait(shown("choose"))
    page.run("history.back()")  # to the result, which is still there
    page.wait(shown("result"))


def test_work_goes_on_through_a_broken_line_and_ends_with_escape(slow_page: Page, long, slow_server):
    page = slow_page
    page.choose_file("#file", long)
    page.wait("location.hash.length > 1")
    job = page.run("location.hash").lstrip("#")
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait(f"{text('#stage')}.includes('trying again')")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait(f"!{text('#stage')}.includes('again')")
    page.errors.clear()  # the browser notes each request that failed
    page.key("Escape")
    page.wait(shown("choose"))
    wait(lambda: slow_server.client.get(f"/v1/separations/{job}").status_code == 404)
    assert page.run("location.hash") == ""


def test_an_address_of_nothing_leads_to_the_start(page: Page, server):
    page.open("about:blank#")
    page.open(f"{server.url}/#{'0' * 32}")
    page.wait(shown("alert"))
    assert "no longer" in page.run(text("#alert")) and page.run(shown("choose"))
    page.errors.clear()


# ------------------------------------------------------------------------------ what it tells


def test_objects_that_the_model_never_learned_are_told_apart(slow_page: Page, tmp_path, slow_server):
    page = slow_page
    ticks = "[...document.querySelectorAll('#options .ticks input{}')].map(i => i.value)"
    assert page.run(ticks.format(":enabled")) == ["dog", "violin"] and len(page.run(ticks.format(":disabled"))) == 21
    assert "never learned" in page.run("document.querySelector('#unlearned-why').textContent")
    assert "2 objects from 40 clips" in page.run(text("#knows"))
    sound = write_sound(tmp_path / "x.wav", 2.0)
    job = slow_server.post(sound, {"Prefer": "wait=60"}, objects="dog,violin,cello").json()
    page.run(f"location.hash = '{job['id']}'")
    page.wait(shown("result"))
    page.wait("document.querySelectorAll('#grid button').length > 0")
    assert "The model was trained on no clip of cello" in page.run(text("#remark"))
    cello = next(o for o in job["result"]["objects"] if o["name"] == "cello")
    assert not cello["silent"] and "named" in cello["doubt"]  # it was named, so it is there
    assert page.run("document.querySelectorAll('.track').length") == 4
    told = page.run("[...document.querySelectorAll('.doubt:not([hidden])')].map(d => d.textContent).join()")
    assert "because it was named" in told
    page.run("document.querySelector('#all-rows').click()")
    rows = page.run("[...document.querySelectorAll('#grid th')].map(h => h.textContent)")
    assert {"loudness", "dog", "violin", "noise"} <= set(rows) <= {"loudness", "dog", "violin", "cello", "noise"}


def test_what_would_be_refused_is_told_before_it_is_sent(slow_page: Page, tmp_path, slow_server):
    page, before = slow_page, slow_server.client.get("/metrics").text.count("POST")
    cases = {
        "long.wav": (write_sound(tmp_path / "long.wav", 70.0), ["long.wav", "lasts 70 seconds", "60 seconds", "avsep"]),
        "notes.txt": (tmp_path / "notes.txt", ["notes.txt", "neither", "MP4"]),
        "nothing.mp4": (tmp_path / "nothing.mp4", ["nothing.mp4", "empty"]),
    }
    (tmp_path / "notes.txt").write_text("no media")
    (tmp_path / "nothing.mp4").write_bytes(b"")
    for path, words in cases.values():
        page.run("document.querySelector('#alert').hidden = true")
        page.choose_file("#file", path)
        page.wait(shown("alert"))
        told = page.run(text("#alert"))
        assert not [w for w in words if w not in told], told
    assert slow_server.client.get("/metrics").text.count("POST") == before


def drop(page: Page, script: str) -> None:
    page.run(
        "(() => { const data = new DataTransfer(); " + script + " document.dispatchEvent("
        "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); })()"
    )


def test_of_several_files_one_is_taken_and_the_others_are_named(slow_page: Page, tmp_path, slow_server):
    page = slow_page
    (tmp_path / "a.wav").write_bytes(write_sound(tmp_path / "x.wav", 2.0).read_bytes())
    page.run(f"window.content = new Uint8Array({list((tmp_path / 'a.wav').read_bytes())})")
    add = "for (const n of ['notes.txt', 'a.wav', 'b.wav']) data.items.add(new File([content], n, "
    drop(page, add + "{type: n.endsWith('txt') ? 'text/plain' : 'audio/wav'}));")
    page.wait(shown("notice"))
    assert page.run(text("#notice")) == "One at a time: took a.wav. Left out: notes.txt, b.wav."
    page.wait(shown("result"))
    for script, word in (
        ("data.setData('text/plain', 'hello');", "text"),
        ("data.setData('text/uri-list', 'https://example.com/x.mp4');", "link"),
    ):
        drop(page, script)
        assert word in page.run(text("#notice"))
    assert page.run(shown("result"))


def test_sounds_come_in_a_small_format_and_once(page: Page, video):
    separate(page, video)
    asked = page.run("performance.getEntriesByType('resource').map(e => e.name.split('/').pop())")
    assert sorted(n for n in asked if "." in n and n.split(".")[1] in ("wav", "flac", "ogg")) == [
        "_rest.ogg", "dog.ogg", "violin.ogg",
    ]  # fmt: skip


# ---------------------------------------------------------------------------- keys and looks


def test_keys(page: Page, video):
    separate(page, video)
    pressed = "document.querySelector(\"[aria-label='{} {}']\").getAttribute('aria-pressed')".format
    page.key(" ")
    page.wait(MIXER % "mixer.playing")
    page.key("ArrowRight")
    page.wait(MIXER % "mixer.position > 5")
    page.key("ArrowLeft")
    page.wait(MIXER % "mixer.position < 4")
    page.key("2")
    assert page.run("document.activeElement.querySelector('h3').textContent") == "dog"
    page.key("m")
    assert page.run(pressed("Mute", "dog")) == "true" and page.run(pressed("Mute", "violin")) == "false"
    page.key("S")
    assert page.run(pressed("Solo", "dog")) == "true"
    for _ in range(3):
        page.key("ArrowDown")
    assert page.run("document.activeElement.querySelector('output').textContent") == "−3 dB"
    page.key("Escape")
    page.wait(MIXER % "!mixer.playing")
    page.key("?")
    assert page.run("document.querySelector('#keys').open")
    page.click("#keys-on")  # off
    page.key("Escape")
    assert not page.run("document.querySelector('#keys').open")
    page.key("m")
    assert page.run(pressed("Mute", "dog")) == "true"


def test_what_is_chosen_is_seen_in_forced_colours(page: Page, video):
    separate(page, video)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}])
    ground = "[...document.querySelectorAll('{}')].map(e => getComputedStyle(e).backgroundColor)".format
    mix, original = page.run(ground("#source span"))
    assert mix != original
    page.click(track("dog", "Mute"))
    on, *off = sorted(page.run(ground(".mute")), key=page.run(ground(".mute")).count)
    assert on not in off
    assert len(set(page.run(ground("#grid button")))) > 1


@pytest.mark.parametrize("width", [1200, 360])
def test_targets_are_large_enough(page: Page, video, width):
    page.look(width, 740)
    separate(page, video)
    least = 44 if width == 360 else 24
    small = page.run(
        "[...document.querySelectorAll('button, .button, a, select, summary, .tick, .ticks label, .switch label, "
        "input[type=range]')].filter(e => e.offsetHeight && !e.closest('h1') && "
        f"(e.offsetHeight < {least} || e.offsetWidth < {least})).map(e => e.outerHTML.slice(0, 80))"
    )
    assert small == []
    assert page.run("document.documentElement.scrollWidth") <= width


def test_the_apis_page_shows_answers_and_schemas(page: Page, server):
    page.open(f"{server.url}/docs")
    page.wait("document.querySelectorAll('section').length > 10")
    said = page.run("document.querySelector('main').textContent")
    for word in ("sound_score", "its share of the sound", '"objects_from": "given"', "Retry-After", "503", "learned"):
        assert word in said, word
    assert "`" not in said
    for look in (1200, 360):
        page.look(look)
        assert page.run("document.documentElement.scrollWidth") <= look


def test_a_separator_without_bases_has_sounds_and_no_map(tmp_path, video):
    with (
        serving(tmp_path, "bands", load=lambda *_: Bands(), max_upload_bytes=3_000_000) as server,
        Page(tmp_path / "profile") as page,
    ):
        page.open(server.url)
        page.wait("document.querySelectorAll('#objects input').length === 2")
        page.choose_file("#file", video)
        page.wait("!document.querySelector('#result').hidden")
        names = page.run("[...document.querySelectorAll('.track h3')].map(h => h.textContent)")
        assert sorted(names) == ["high", "low", "the rest"]  # the loudest first
        hints = page.run("[...document.querySelectorAll('.track .hint')].map(p => p.textContent)")
        assert hints == ["claims 50 % of the sound, over 99 % sure that it is heard"] * 2 + ["everything else"]
        shown = "['#map', '#png'].map(id => document.querySelector(id).checkVisibility())"
        page.wait("document.querySelector('#zip').href.endsWith('archive.zip')")
        assert page.run(shown) == [False, False]
        page.click("#play")
        page.wait(MIXER % "mixer.playing")
        low, high = page.run(LISTEN)
        page.click(track("low", "Mute"))
        muted = page.run(LISTEN)
        assert muted[0] < low - 20 and muted[1] > high - 6
        assert page.errors == []


# ------------------------------------------------------------------------------- what is saved


def saved(page: Page, folder: Path, press) -> Path:
    """The file that the page saves when something is pressed."""
    folder.mkdir(exist_ok=True)
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    before = set(folder.iterdir())
    press()
    page.wait(f"{text('#mix-line')}.startsWith('Saved')")
    page.wait(lambda: any(p.suffix != ".crdownload" for p in set(folder.iterdir()) - before))
    (file,) = set(folder.iterdir()) - before
    return file


def test_the_mix_is_saved_as_sound_and_video_as_the_faders_are(page: Page, tmp_path, video):
    separate(page, video)
    page.run("(f => { f.value = -6; f.oninput(); })(document.querySelectorAll('.track .fader input')[0])")
    page.click(track("dog", "Mute"))
    page.run("document.querySelector('#mix-format').value = 'flac'")
    file = saved(page, tmp_path / "saved", lambda: page.click("#mix-sound"))
    assert file.name == "duet-mix.flac"
    level = {}
    for name, hz in PITCH.items():
        samples, rate = soundfile.read(file)
        level[name] = np.abs(np.fft.rfft(samples))[round(hz * len(samples) / rate)]
    assert level["dog"] < 0.05 * level["violin"]
    page.run("document.querySelector('#mix-video').focus()")
    page.run("document.querySelector('#mix-line').textContent = ''")
    film = saved(page, tmp_path / "saved", lambda: page.key("Enter"))  # by keyboard
    assert film.name == "duet-mix.mp4" and packets(film)[1] == packets(video)[1]
    heard = decoded(film, tmp_path)[0]
    here = min(len(heard), len(samples))
    assert np.corrcoef(heard[:here], samples[:here])[0, 1] > 0.95
    film_url = "`/v1/separations/${location.hash.slice(1)}/mix.mp4?gains=dog:0`"  # the browser plays it, with sound
    page.run(f"window.film = Object.assign(document.createElement('video'), {{src: {film_url}}})")
    page.run("window.film.muted = true; window.film.play().catch(e => { window.failed = String(e); })")
    page.wait("window.failed || (window.film.currentTime > 0.5 && window.film.videoWidth > 0)")
    assert not page.run("window.failed") and page.run("window.film.webkitAudioDecodedByteCount") > 0


def test_options_are_sent_and_kept_out_of_the_way(page: Page, tmp_path, server):
    """By keyboard: the options open, a choice is made in each."""
    page.wait("document.querySelectorAll('#two-stems option').length > 1")
    assert not page.run("document.querySelector('#two-stems').checkVisibility()")
    page.run("document.querySelector('#more summary').focus()")
    page.key("Enter")
    page.wait("document.querySelector('#two-stems').checkVisibility()")
    page.key("Tab")
    for letter in "violin":
        page.key(letter)
    page.key("Tab")
    for letter in "fl":
        page.key(letter)
    page.key("Tab")
    page.key(" ")
    chosen = "[document.querySelector('#two-stems').value, document.querySelector('#format').value,"
    assert page.run(f"{chosen} document.querySelector('#mono').checked]") == ["violin", "flac", True]
    separate(page, write(tmp_path / "duet.wav", np.tile(tone("violin", 3.0) + tone("dog", 3.0), (2, 1)), RATE))
    assert page.run("[...document.querySelectorAll('.track h3')].map(h => h.textContent)") == ["violin", "the rest"]
    job = server.client.get(f"/v1/separations/{page.run('location.hash').lstrip('#')}").json()["result"]
    assert (job["channels"], job["format"], job["two_stems"]) == (1, "flac", "violin")
    assert page.run("document.querySelector('#mix-format').value") == "flac"
    assert not page.run("document.querySelector('#mix-video').checkVisibility()")


def test_stereo_is_played_as_stereo(page: Page, tmp_path):
    left, right = tone("dog", 3.0), tone("violin", 3.0)
    separate(page, write(tmp_path / "stereo.wav", np.stack([left, right]), RATE))
    assert page.run(MIXER % "mixer.tracks.map(t => t.buffer.numberOfChannels)") == [2, 2, 2]
    dog = "mixer.tracks.find(t => t.name === 'dog').buffer"
    energy = f"[0, 1].map(c => {dog}.getChannelData(c).reduce((sum, x) => sum + x * x, 0))"
    left, right = page.run(MIXER % energy)
    assert left > 5 * right
    drawn = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x, i) => i % 4 === 3 && x > 0)"
    page.wait(f"[...document.querySelectorAll('.wave, .spectrogram')].slice(0, 4).every(c => {drawn})")


def test_what_cannot_be_mixed_is_said(page: Page, tmp_path, server):
    separate(page, write_sound(tmp_path / "duet.wav"))
    server.client.delete(f"/v1/separations/{page.run('location.hash').lstrip('#')}")
    page.click("#mix-sound")
    page.wait(shown("alert"))
    assert "expired" in page.run(text("#alert")) and page.run(text("#mix-line")) == ""
    page.errors.clear()


def test_what_the_model_learned_and_what_is_being_done_are_said_at_once(slow_page: Page, long):
    assert "2 objects from 40 clips, so many of each: dog 12, violin 30" in slow_page.run(text("#knows"))
    slow_page.choose_file("#file", long)
    started = time.monotonic()
    slow_page.wait(shown("work"))
    assert slow_page.run(text("#stage")) and time.monotonic() - started < 1
