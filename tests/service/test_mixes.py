"""The service's sounds as their file was, in the formats that hold them, and mixes of them."""

import io
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from avsep.service import answers
from avsep.service.mixing import parse_gains
from tests.support.serving import PITCH, RATE, Server, serving, wait, write_model
from tests.support.streams import decoded, lag_s, packets, run_ffmpeg, write

PAN = {"dog": (1.0, 0.3), "violin": (0.2, 1.0)}
PICTURE = ["-f", "lavfi", "-i", "testsrc=s=32x32:r=25:d=3"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    with serving(tmp_path_factory.mktemp("service"), model) as running:
        yield running


def duet(n_channels: int, rate: int, seconds: float = 2.0) -> np.ndarray:
    """A dog and a violin, `(C, S)`, by turns to the left and the right."""
    t = np.arange(int(rate * seconds)) / rate
    sounds = {name: 0.3 * np.sin(2 * np.pi * hz * t) * (np.sin(9 * t + hz) > -0.4) for name, hz in PITCH.items()}
    return sum(np.outer(np.resize(PAN[name], n_channels), x) for name, x in sounds.items()).astype(np.float32)


def separate(server: Server, path: Path, **fields: str) -> dict:
    answer = server.post(path, {"Prefer": "wait=60"}, **({"objects": "dog,violin"} | fields))
    assert answer.status_code == 201, answer.text
    return answer.json()["result"]


def fetch(server: Server, url: str, **query: str) -> httpx.Response:
    answer = server.client.get(url, params=query)
    assert answer.status_code == 200, answer.text
    return answer


def sound(server: Server, url: str, **query: str) -> np.ndarray:
    """A sound, `(C, S)`."""
    return soundfile.read(io.BytesIO(fetch(server, url, **query).content), dtype="float32", always_2d=True)[0].T


def parts(result: dict) -> list[dict]:
    return [*(o["audio"] for o in result["objects"] if o["audio"]), result["rest"]]


def mixes(server: Server) -> list[Path]:
    """Files of mixes that haven't gone yet."""
    return [p for folder in server.folders() for p in folder.glob("mix.*")]


@pytest.mark.parametrize(("n_channels", "rate"), [(1, 8000), (1, 48_000), (2, 44_100), (2, 96_000), (6, 48_000)])
def test_sounds_are_as_their_file_and_add_up(server, tmp_path, n_channels, rate):
    whole = duet(n_channels, rate)
    result = separate(server, write(tmp_path / "duet.wav", whole, rate))
    assert (result["channels"], result["sample_rate"]) == (n_channels, rate)
    found = [sound(server, part["wav"]) for part in parts(result)]
    rms = np.sqrt((whole**2).mean(1, keepdims=True))
    assert len(found) == 3 and all(f.shape == whole.shape for f in found)
    assert (np.abs(sum(found) - whole) <= 1e-3 * rms).all()
    assert (np.abs(sound(server, result["mixture"]["wav"]) - whole) <= 1e-3 * rms).all()
    dog, violin = ((f**2).sum(1) for f in found[:2])
    assert n_channels == 1 or (dog[0] > 2 * dog[1] and violin[1] > 2 * violin[0])
    assert (result["mixture"]["mp3"] is None) == (n_channels > 2 or rate > 48_000)
    for kind in ("mp3", "flac", "ogg"):
        url = result["mixture"]["wav"].replace("wav", kind)
        assert server.client.get(url).status_code == (200 if result["mixture"][kind] else 404)
    base = result["relation"]["data"].removesuffix("/relation")
    bases = sum(sound(server, f"{base}/bases/{m}.wav") for m in range(6))  # of one channel at the model's sample rate
    assert bases.shape == (1, 2 * RATE) and np.abs(bases).max() > 0.1


@pytest.mark.parametrize("n_channels", [3, 5, 6, 8])
def test_loudspeakers_keep_their_order_in_ogg(server, tmp_path, n_channels):
    t = np.arange(8000) / 8000
    whole = np.stack([0.2 * np.sin(2 * np.pi * (200 + 100 * c) * t) for c in range(n_channels)])
    result = separate(server, write(tmp_path / "tones.wav", whole, 8000), objects="dog")
    (tmp_path / "tones.ogg").write_bytes(fetch(server, result["mixture"]["ogg"]).content)
    heard = decoded(tmp_path / "tones.ogg", tmp_path)
    pitches = np.abs(np.fft.rfft(heard[:, :8000])).argmax(1)
    assert pitches.tolist() == [200 + 100 * c for c in range(n_channels)]


def test_mono_is_one_channel_at_the_models_sample_rate(server, tmp_path):
    result = separate(server, write(tmp_path / "duet.wav", duet(2, 44_100), 44_100), mono="true")
    assert (result["channels"], result["sample_rate"]) == (1, RATE)
    assert sound(server, result["rest"]["wav"]).shape == (1, 2 * RATE)


def test_two_stems_are_an_object_and_all_the_rest(server, tmp_path):
    whole = duet(2, 8000)
    file = write(tmp_path / "duet.wav", whole, 8000)
    result = separate(server, file, two_stems="Fiddle", format="flac")
    assert (result["two_stems"], result["format"]) == ("violin", "flac")
    assert {o["name"]: bool(o["audio"]) for o in result["objects"]} == {"dog": False, "violin": True}
    assert result["rest"]["wav"].endswith("/no_violin.wav")
    violin, rest = (sound(server, part["wav"]) for part in parts(result))
    assert np.abs(violin + rest - whole).max() < 1e-5
    mixed = sound(server, result["mix"]["sound"], gains="_rest:0")
    assert np.abs(mixed - violin).max() < 1e-6
    archive = zipfile.ZipFile(io.BytesIO(fetch(server, result["archive"]).content))
    names = {"violin.flac", "no_violin.flac", "_mixture.flac", "relation_map.png", "separation.json"}
    assert set(archive.namelist()) == names
    kept = soundfile.read(io.BytesIO(archive.read("violin.flac")), always_2d=True)[0].T
    assert kept.shape == whole.shape and np.abs(kept - violin).max() < 1e-6
    alone = separate(server, file, two_stems="cello", objects="dog")  # who asks for it says that it is there
    assert [o["name"] for o in alone["objects"] if o["audio"]] == ["cello"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "ogg"}, "'format' is 'ogg'; it is wav, flac or mp3"),
        ({"format": ""}, "'format' is ''"),
        ({"mono": "maybe"}, "'mono' is 'maybe'; it is true or false"),
        ({"two_stems": "violine"}, "did you mean violin?"),
        ({"two_stems": ""}, "'two_stems' names no object"),
        ({"format": "mp3"}, "6 channels, and mp3 at most 2: give another 'format', or 'mono'"),
        ({"format": "mp3", "mono": "1"}, ""),
    ],
)
def test_what_cannot_be_had_is_told(server, tmp_path, fields, words):
    file = write(tmp_path / "duet.wav", duet(6, 16_000, 0.5), 16_000)
    answer = server.post(file, {"Prefer": "wait=60"}, objects="dog", **fields)
    assert answer.status_code == (422 if words else 201), answer.text
    assert words in answer.json().get("detail", "")


# ---------------------------------------------------------------------------------- mixes


def test_a_mix_is_the_weighted_sum(server, tmp_path):
    result = separate(server, write(tmp_path / "duet.wav", duet(2, 44_100), 44_100))
    dog, violin, rest = (sound(server, part["wav"]) for part in parts(result))
    url = result["mix"]["sound"]
    mixed = sound(server, url, gains="violin:0.5, _rest:0")
    assert np.abs(mixed - (dog + 0.5 * violin)).max() < 1e-6
    assert np.abs(sound(server, url) - (dog + violin + rest)).max() < 1e-6
    for format, most in (("flac", 1e-6), ("mp3", 0.1)):
        answer = fetch(server, url, gains="violin:0.5,_rest:0", format=format)
        other = soundfile.read(io.BytesIO(answer.content), always_2d=True)[0].T
        assert np.abs(other[:, 2000:80_000] - mixed[:, 2000:80_000]).max() < most
        assert answer.headers["content-disposition"].endswith(f'.{format}"') and "avsep-note" not in answer.headers
    wait(lambda: not mixes(server))


def test_what_would_clip_is_made_softer_and_told(server, tmp_path):
    result = separate(server, write(tmp_path / "duet.wav", 2 * duet(2, 8000), 8000))
    loud = sound(server, result["mix"]["sound"], gains="dog:4,violin:4")
    assert np.abs(loud).max() > 1.5  # floats hold it
    answer = fetch(server, result["mix"]["sound"], gains="dog:4,violin:4", format="flac")
    softer = soundfile.read(io.BytesIO(answer.content), always_2d=True)[0].T
    decibels = float(answer.headers["avsep-note"].split()[1])
    assert np.abs(softer - 10 ** (-decibels / 20) * loud).max() < 0.02 and 0.99 < np.abs(softer).max() < 1
    assert "softer" in answer.headers["avsep-note"]


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ("cello:1", "'cello'; the sounds are dog, violin, _rest"),
        ("dog:5", "'5'; give a number from 0 to 4"),
        ("dog:-1", "'-1'"),
        ("dog:nan", "'nan'"),
        ("dog", "''; give a number"),
        ("dog:1,dog:0", "dog twice"),
    ],
)
def test_gains_that_are_none_are_told(gains, words):
    with pytest.raises(ValueError) as told:
        parse_gains(gains, ["dog", "violin", "_rest"])
    assert words in str(told.value) and len(str(told.value)) < 160


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """Four seconds of pictures whose sound starts .7 s after them."""
    folder = tmp_path_factory.mktemp("media")
    write(folder / "duet.wav", duet(2, 44_100), 44_100)
    late = ["-itsoffset", "0.7", "-i", folder / "duet.wav"]
    run_ffmpeg(*PICTURE, *late, "-c:v", "libx264", "-bf", "2", "-pix_fmt", "yuv420p", folder / "late.mp4")
    return folder / "late.mp4"


def test_a_mix_comes_under_the_untouched_pictures(server, film, tmp_path):
    result = separate(server, film)
    stored = server.service.store.usage()["bytes"]
    assert stored > film.stat().st_size and result["mix"]["video"].endswith("/mix.mp4")
    (tmp_path / "mix.mp4").write_bytes(fetch(server, result["mix"]["video"], gains="dog:0.5,_rest:0").content)
    (at_s, pictures), (was_s, same) = packets(tmp_path / "mix.mp4"), packets(film)
    assert pictures == same
    mixed = sound(server, result["mix"]["sound"], gains="dog:0.5,_rest:0")
    heard = decoded(tmp_path / "mix.mp4", tmp_path)
    later_s = lag_s(heard[0], mixed[0], 44_100)
    zero_s = lag_s(decoded(film, tmp_path)[0], sound(server, result["mixture"]["wav"])[0], 44_100)
    assert heard.shape[0] == 2 and abs((at_s - later_s) - (was_s - zero_s)) < 0.04  # a frame
    rms = np.sqrt((mixed**2).mean())
    shift = round(44_100 * later_s)
    there, own = heard[:, 40_000 + shift : 80_000 + shift], mixed[:, 40_000:80_000]
    assert np.sqrt(((there - own) ** 2).mean()) < 0.2 * rms  # the right gains, in AAC
    answer = server.client.get(result["mix"]["video"].replace("mp4", "mkv"))
    assert answer.status_code == 404 and "mix.mp4" in answer.json()["detail"]
    wait(lambda: not mixes(server))
    job = result["archive"].removesuffix("/archive.zip")
    folder = server.service.store.path(job.rsplit("/", 1)[1])
    assert (folder / "upload").exists() and server.client.delete(job).status_code == 204 and not folder.exists()


def test_pictures_that_mp4_cannot_hold_come_as_mkv_and_sound_has_none(server, film, tmp_path):
    run_ffmpeg("-i", film, "-c:v", "libvpx", "-c:a", "libopus", tmp_path / "duet.webm")
    result = separate(server, tmp_path / "duet.webm")
    assert result["mix"]["video"].endswith("/mix.mkv")
    (tmp_path / "mix.mkv").write_bytes(fetch(server, result["mix"]["video"]).content)
    assert packets(tmp_path / "mix.mkv")[1] == packets(tmp_path / "duet.webm")[1]
    alone = separate(server, write(tmp_path / "duet.wav", duet(1, 8000), 8000))
    job = alone["archive"].removesuffix("/archive.zip")
    assert alone["mix"]["video"] is None and server.client.get(f"{job}/mix.mp4").status_code == 404
    assert not (server.service.store.path(job.rsplit("/", 1)[1]) / "upload").exists()


def test_a_mix_that_does_not_fit_is_refused_and_takes_nobodys_result(tmp_path, server):
    file = write(tmp_path / "duet.wav", duet(2, 44_100), 44_100)
    one = 2 * 44_100 * 2 * 4  # a sound's bytes
    with serving(tmp_path, server.config.model, results_bytes=round(5.6 * one)) as small:
        result = separate(small, file, two_stems="dog")  # three of them, the upload, and what else is kept
        (tmp_path / "results" / result["archive"].split("/")[3] / "ballast").write_bytes(b"x" * 2 * one)
        answer = small.client.get(result["mix"]["sound"])
        assert answer.status_code == 507 and answer.headers["retry-after"]
        assert small.client.get(result["rest"]["wav"]).status_code == 200
        assert not mixes(small)


def test_a_mix_makes_room_of_older_results_but_not_of_its_own(tmp_path, server):
    file = write(tmp_path / "duet.wav", duet(2, 44_100), 44_100)
    one = 4 * 4 * 44_100 * 2 * 2
    with serving(tmp_path, server.config.model, results_bytes=round(2.4 * one)) as small:
        first, second = separate(small, file), separate(small, file)
        small.service.store._known.clear()
        assert small.client.get(second["mix"]["sound"]).status_code == 200
        assert small.client.get(first["rest"]["wav"]).status_code in (200, 404)
        assert small.client.get(second["rest"]["wav"]).status_code == 200


def test_the_room_for_a_result_counts_its_channels(tmp_path, server):
    """What a stereo file's sounds need is more than this store has, while one channel's fit."""
    file = write(tmp_path / "duet.wav", duet(6, 48_000), 48_000)
    with serving(tmp_path, server.config.model, results_bytes=file.stat().st_size + 2_000_000) as small:
        assert small.post(file, objects="dog,violin").status_code == 507
        assert separate(small, file, mono="true")["channels"] == 1


def test_a_client_that_goes_leaves_no_mix(server, tmp_path):
    result = separate(server, write(tmp_path / "duet.wav", duet(2, 48_000, 20.0), 48_000), objects="dog")
    with server.client.stream("GET", result["mix"]["sound"]) as answer:
        next(answer.iter_raw())
    wait(lambda: not mixes(server))


def test_the_description_has_the_options_and_the_mixes(server):
    described = server.client.get("/openapi.json").json()
    form = described["paths"]["/v1/separations"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"format", "mono", "two_stems"} <= set(form["properties"])
    assert {"/v1/separations/{job_id}/mix", "/v1/separations/{job_id}/mix.{kind}"} <= set(described["paths"])
    answers.Job.model_validate(answers.JOB)


def test_room_is_kept_for_each_sound_and_for_the_mono_mix_once(server, tmp_path):
    rate = 2 * RATE
    x = duet(2, rate)
    soundfile.write(tmp_path / "duet.wav", x.T, rate, subtype="FLOAT")
    job = server.post(tmp_path / "duet.wav", {"Prefer": "wait=60"}, objects="dog,violin").json()
    reserved = server.service.store.job(job["id"]).reserved
    upload, mono = (tmp_path / "duet.wav").stat().st_size, x.nbytes / 4  # one channel at half the rate
    assert upload + 4 * x.nbytes + mono < reserved < upload + 4 * x.nbytes + 2.3 * mono + (1 << 16) + 60_000
