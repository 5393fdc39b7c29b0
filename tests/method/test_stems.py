"""Sounds as their file was: its channels and sample rate, in the formats that can hold them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from avsep import cli, commands, stems
from avsep.outputs import Output
from avsep.separation import Separator, Whole, render_whole
from avsep.stft import STFT
from avsep.videos import VideoSeparator
from tests.support.streams import decoded, lag_s, packets, read, run_ffmpeg, write
from tests.support.tones import DOG, PITCH, RATE, VIOLIN, model

PAN = {DOG: (1.0, 0.3), VIOLIN: (0.2, 1.0)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model().save(folder)
    return str(folder)


def sounds(rate: int, seconds: float = 3.0) -> dict[int, NDArray]:
    """Each object's sound, `(S,)`; from 8 kHz on the violin has a partial that the model's band doesn't reach."""
    t = np.arange(int(rate * seconds)) / rate
    dog = np.sin(2 * np.pi * PITCH[DOG] * t) * (np.sin(2 * np.pi * 3 * t + DOG) > -0.3) / 4
    violin = np.sin(2 * np.pi * PITCH[VIOLIN] * t) / 4 + (rate >= 8000) * np.sin(2 * np.pi * 4 * PITCH[VIOLIN] * t) / 16
    return {DOG: dog, VIOLIN: violin * (np.sin(2 * np.pi * 2 * t + VIOLIN) > -0.3)}


def panned(rate: int, n_channels: int = 2, seconds: float = 3.0) -> dict[int, NDArray]:
    """Each object's sound in each channel, `(C, S)`, `PAN` by turns."""
    return {i: np.outer(np.resize(PAN[i], n_channels), x) for i, x in sounds(rate, seconds).items()}


def separate(*arguments: object) -> int:
    return cli.main(["separate", *map(str, arguments)])


def sdr(reference: NDArray, estimate: NDArray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((reference - estimate) ** 2).sum()))


def adds_up(out: Path, whole: NDArray) -> bool:
    """Whether each channel's sounds add up to it within a thousandth of its RMS."""
    total = sum(read(out / name) for name in json.loads((out / "separation.json").read_text())["files"])
    rms = np.sqrt((whole**2).mean(1, keepdims=True))
    return total.shape == whole.shape and bool((np.abs(total - whole) <= 1e-3 * rms).all())


@pytest.mark.parametrize(
    ("n_channels", "rate"),
    [(1, 2000), (1, 8000), (1, 48_000), (1, 96_000), (2, 8000), (2, 44_100), (2, 96_000), (6, 44_100), (6, 48_000)],
)
def test_sounds_are_as_their_file(model_dir: str, tmp_path: Path, n_channels: int, rate: int) -> None:
    whole = sum(panned(rate, n_channels).values()).astype(np.float32)
    out = tmp_path / "out"
    assert separate(write(tmp_path / "duet.wav", whole, rate), "--model", model_dir, "--out", out) == 0
    for name in ("dog", "violin", "_rest"):
        info = soundfile.info(out / f"{name}.wav")
        assert (info.channels, info.samplerate, info.subtype) == (n_channels, rate, "FLOAT")
    report = json.loads((out / "separation.json").read_text())
    assert (report["channels"], report["sample_rate"]) == (n_channels, rate)
    assert sorted(report["files"]) == ["_rest.wav", "dog.wav", "violin.wav"] and adds_up(out, whole)


@pytest.mark.parametrize("rate", [8000, 44_100, 44_101])
def test_channels_are_divided_no_worse_than_their_mix(model_dir: str, tmp_path: Path, rate: int) -> None:
    own = panned(rate)
    file = write(tmp_path / "duet.wav", sum(own.values()), rate)
    for folder, more in (("own", []), ("mono", ["--mono"])):
        assert separate(file, "--model", model_dir, "--objects", "dog,violin", "--out", tmp_path / folder, *more) == 0
    for index, name in ((DOG, "dog"), (VIOLIN, "violin")):
        mono = read(tmp_path / "mono" / f"{name}.wav")[0]
        mixed = np.mean(PAN[index]) * sounds(RATE)[index]
        length = min(len(mono), len(mixed))
        apart = sdr(own[index], read(tmp_path / "own" / f"{name}.wav"))
        assert apart > min(25, sdr(mixed[:length], mono[:length]) - 1)


def leaky(own: list[NDArray], stft: STFT) -> NDArray:
    """Estimates of two sounds' mix by masks that leave each a tenth of the other, and a rest of nothing, `(3, S)`."""
    power = [stft(torch.from_numpy(x).float()).abs().square() for x in own]
    mix = torch.from_numpy(sum(own)).float()
    first = 0.1 + 0.8 * power[0] / sum(power).clamp_min(1e-9)
    parts = [stft.inverse(mask * stft(mix), len(mix)) for mask in (first, 1 - first, 0 * first)]
    return torch.stack(parts).numpy()


@pytest.mark.parametrize(
    ("pans", "at_least"),  # dB; the masks' own sounds have 6.7 and 6.9, in the middle
    [
        ([(1.0, 0.0), (0.0, 1.0)], 20),
        ([(0.8, 0.2), (0.2, 0.8)], 20),
        ([(0.6, 0.4), (0.4, 0.6)], 20),
        ([(0.5, 0.5), (0.5, 0.5)], 5.5),  # nothing tells them apart
        ([(0.7, -0.3), (0.3, 0.7)], 9),  # partly in opposite phase: the mix has little of one
    ],
)
def test_panned_sounds_are_told_apart_by_where_they_are(pans: list[tuple[float, float]], at_least: float) -> None:
    """Two noises that are everywhere in the spectrum, now and then alone."""
    rng, stft, t = np.random.default_rng(0), STFT(8000, 1200, 300), np.arange(40_000) / 8000
    own = [rng.standard_normal(len(t)) * (np.sin(2 * np.pi * f * t) > -0.3) for f in (0.5, 0.7)]
    whole = sum(np.outer(pan, x) for pan, x in zip(pans, own, strict=True)).astype(np.float32)
    estimates = leaky([sum(pan) * x / 2 for pan, x in zip(pans, own, strict=True)], stft)
    parts = np.concatenate(list(stems.carry_over([estimates], [whole], stft.sample_rate, stft)), 2)
    assert np.abs(parts.sum(0) - whole).max() < 1e-5
    assert min(sdr(np.outer(pan, x), part) for pan, x, part in zip(pans, own, parts, strict=False)) > at_least


def test_places_have_their_closed_forms() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 4, 500)) + 1j * rng.standard_normal((3, 4, 500))
    pans = np.array([[1.0, 0.0], [0.6, 0.8], [0.8, -0.6]])  # of length one
    values = (pans.T[:, :, None] * noise[:, 0]).reshape(2, -1)
    values = np.concatenate([values, noise[:2, 3]], 1)  # the rest is everywhere
    gains = np.repeat(np.eye(4), 500, 1)
    found = stems.places(torch.tensor(values, dtype=torch.complex64), torch.tensor(gains, dtype=torch.float32))
    expected = [*(np.outer(p, p) for p in pans), np.eye(2) / 2]
    assert np.abs(found[:3].numpy() - np.stack(expected[:3])).max() < 1e-3
    assert np.abs(found[3].numpy() - expected[3]).max() < 0.2  # by few bins
    silent = stems.places(torch.zeros(2, 10, dtype=torch.complex64), torch.zeros(4, 10))
    assert silent.isfinite().all()


def test_a_mono_file_at_the_models_rate_is_separated_as_ever(model_dir: str, tmp_path: Path) -> None:
    mixture = sum(sounds(RATE).values()).astype(np.float32)
    file, out = write(tmp_path / "duet.wav", mixture[None], RATE), tmp_path / "out"
    assert separate(file, "--model", model_dir, "--objects", "dog,violin", "--out", out) == 0
    _, estimates = render_whole(Separator.load(model_dir), mixture, ["dog", "violin"])
    for name, row in zip(("dog", "violin", "_rest"), estimates, strict=True):
        assert np.array_equal(soundfile.read(out / f"{name}.wav", dtype="float32")[0], row)


def test_opposite_phases_are_divided_by_their_difference(model_dir: str, tmp_path: Path) -> None:
    own = sounds(8000)
    whole = np.outer([1, -1], sum(own.values()))
    out = tmp_path / "out"
    assert separate(write(tmp_path / "duet.wav", whole, 8000), "--model", model_dir, "--out", out) == 0
    assert adds_up(out, whole) and sdr(np.outer([1, -1], own[DOG]), read(out / "dog.wav")) > 20


def test_sound_that_starts_late_keeps_its_place(model_dir: str, tmp_path: Path) -> None:
    write(tmp_path / "duet.wav", sum(panned(8000).values()), 8000)
    late, out = tmp_path / "late.mkv", tmp_path / "out"
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=10:d=4"]
    run_ffmpeg(*picture, "-itsoffset", "0.7", "-i", tmp_path / "duet.wav", "-c:v", "mpeg4", "-c:a", "pcm_f32le", late)
    assert separate(late, "--model", model_dir, "--out", out, "--objects", "dog,violin") == 0
    whole = decoded(late, tmp_path)
    assert np.abs(whole[:, :5500]).max() == 0 and adds_up(out, whole)


@pytest.mark.parametrize(
    ("n_channels", "rate", "name", "first", "then"),
    [
        (1, 44_100, "late.mp4", ["-itsoffset", "0.7"], []),  # an empty edit
        (2, 44_100, "cut.mp4", [], ["-ss", "0.53"]),  # an edit that skips what was decoded
        (2, 48_000, "clock.mkv", [], ["-output_ts_offset", "5"]),
        (6, 48_000, "late.mov", ["-itsoffset", "0.3"], ["-ss", "0.1"]),
        (6, 48_000, "clock.ts", [], ["-output_ts_offset", "2"]),
    ],
)
def test_edit_lists_and_start_times_change_nothing_of_the_sum(
    tmp_path: Path, n_channels: int, rate: int, name: str, first: list[str], then: list[str]
) -> None:
    write(tmp_path / "duet.wav", sum(panned(rate, n_channels).values()), rate)
    whole, file, out = tmp_path / f"whole{Path(name).suffix}", tmp_path / name, tmp_path / "out"
    sound = ["-guess_layout_max", 8, "-i", tmp_path / "duet.wav", "-c:a", "aac"]
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:r=25:d=4", *first, *sound, "-c:v", "mpeg4", whole)
    run_ffmpeg("-i", whole, *then, "-c", "copy", file)
    report = by_halves(file, out)
    assert (report["channels"], report["sample_rate"]) == (n_channels, rate)
    assert adds_up(out, decoded(file, tmp_path))


@pytest.mark.parametrize("order", ["mono-stereo.mp3", "stereo-mono.ogg"])
def test_channels_that_change_on_the_way_are_all_taken(model_dir: str, tmp_path: Path, order: str) -> None:
    """As many as the header says; the Ogg file is a chain of two links."""
    both, file, out = sum(panned(8000).values()), tmp_path / order, tmp_path / "out"
    parts = order.split(".")[0].split("-")
    for name in parts:
        write(tmp_path / f"{name}.wav", both[: 1 + (name == "stereo")], 8000)
        run_ffmpeg("-i", tmp_path / f"{name}.wav", tmp_path / f"{name}{file.suffix}")
    file.write_bytes(b"".join((tmp_path / f"{name}{file.suffix}").read_bytes() for name in parts))
    assert separate(file, "--model", model_dir, "--out", out, "--objects", "dog,violin") == 0
    total = sum(read(p) for p in out.glob("*.wav"))
    assert total.shape[0] == 2 and abs(total.shape[1] - 48_000) < 4000
    for name, part in zip(parts, (total[:, 4000:16_000], total[:, 28_000:40_000]), strict=True):
        assert (np.corrcoef(part)[0, 1] > 0.999) == (name == "mono")


def test_a_long_file_is_carried_over_in_constant_memory_and_blocks_do_not_matter() -> None:
    stft, rate = STFT(RATE, 300, 75), 5001
    rng = np.random.default_rng(0)
    estimates, channels = rng.standard_normal((3, 40_000)), rng.standard_normal((2, 100_020))
    estimates, channels = estimates.astype(np.float32), channels.astype(np.float32)

    def carried(n_blocks: int) -> NDArray:
        parts = (np.array_split(x, n_blocks, 1) for x in (estimates, channels))
        blocks = list(stems.carry_over(*parts, rate, stft))
        assert max(b.shape[-1] for b in blocks) < 33 * 75 * rate / RATE
        return np.concatenate(blocks, 2)

    one = carried(1)
    assert one.shape == (3, 2, 100_020) and np.abs(one.sum(0) - channels).max() < 1e-5
    assert np.array_equal(one, carried(17))


def test_frames_have_lengths_that_are_quick_to_transform() -> None:
    """Those of the file's rates would have primes in them, such as 6616 = 8 * 827."""
    own = STFT(48_000, 7200, 1800)
    for rate in (8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000):
        n, exact = stems.window_length(own, rate), 0.15 * rate
        assert exact - 1 <= n <= 1.04 * exact and n % 2 == 0
        for prime in (2, 3, 5, 7, 11):
            while n % prime == 0:
                n //= prime
        assert n == 1


def test_parts_of_the_same_sound_come_back() -> None:
    """Of channels that are the mix itself an object gets what it was there, but for the ends of the gains' windows."""
    mixture, own = sum(sounds(RATE).values()).astype(np.float32), sounds(RATE)
    estimates = np.stack([own[DOG], own[VIOLIN], 0 * mixture]).astype(np.float32)
    (parts,) = [np.concatenate(list(stems.carry_over([estimates], [mixture[None]], RATE, STFT(RATE, 300, 75))), 2)]
    assert min(sdr(estimates[j], parts[j, 0]) for j in (0, 1)) > 30
    silent = np.concatenate(list(stems.carry_over([estimates[2:]], [mixture[None]], RATE, STFT(RATE, 300, 75))), 2)
    assert np.array_equal(silent, mixture[None, None])


# ---------------------------------------------------------------------------------- two stems, and formats


def test_two_stems_are_an_object_and_all_the_rest(model_dir: str, tmp_path: Path, capfd) -> None:
    whole, out = sum(panned(8000).values()), tmp_path / "out"
    command = (write(tmp_path / "duet.wav", whole, 8000), "--model", model_dir, "--out", out)
    assert separate(*command) == 0
    violin = read(out / "violin.wav")
    capfd.readouterr()
    assert separate(*command, "--two-stems", "Violin") == 0
    said = capfd.readouterr().out.splitlines()
    told = {line.split(":")[0] for line in said if "% of the sound" in line}
    assert told == {f"{out}/violin.wav", "dog, in no_violin.wav"}  # no file is named that isn't there
    sounds_there = {p.name for p in out.iterdir() if p.suffix != ".png"}
    assert sounds_there == {"violin.wav", "no_violin.wav", "separation.json"} and adds_up(out, whole)
    assert np.array_equal(read(out / "violin.wav"), violin)
    report = json.loads((out / "separation.json").read_text())
    assert report["rest"] == "no_violin.wav"
    assert {o["name"]: o["file"] for o in report["objects"]} == {"violin": "violin.wav", "dog": None}
    for more in ([], ["--objects", "dog"]):  # nobody heard it, or named it: who asks for it says that it is there
        assert separate(*command, "--two-stems", "cello", *more) == 0
        assert (out / "cello.wav").exists() and adds_up(out, whole) and not (out / "violin.wav").exists()


def test_a_run_replaces_the_one_before_in_whatever_format(model_dir: str, tmp_path: Path, capfd) -> None:
    whole, out = sum(panned(8000).values()), tmp_path / "out"
    file = write(tmp_path / "duet.wav", whole, 8000)
    for suffix in ("mp3", "flac", "wav"):
        assert separate(file, "--model", model_dir, "--objects", "dog", "--out", out, "--format", suffix) == 0
        there = {p.name for p in out.iterdir()}
        assert there == {f"dog.{suffix}", f"_rest.{suffix}", "separation.json", "relation_map.png"}
        info = soundfile.info(out / f"dog.{suffix}")
        assert (info.channels, info.samplerate, info.subtype) == {
            "mp3": (2, 8000, "MPEG_LAYER_III"), "flac": (2, 8000, "PCM_24"), "wav": (2, 8000, "FLOAT"),
        }[suffix]  # fmt: skip
        assert suffix == "mp3" or adds_up(out, whole)
    (out / "mine.flac").write_text("somebody's")
    assert separate(file, "--model", model_dir, "--objects", "dog", "--out", out) == 0
    assert separate(file, "--model", model_dir, "--out", out, "--format", "flac") == 2
    assert "holds mine.flac, which no separation wrote" in capfd.readouterr().err
    soundfile.write(out / "dog.flac", whole.T, 8000)
    assert separate(out / "dog.flac", "--model", model_dir, "--out", out, "--format", "flac") == 2
    assert "would overwrite or delete" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("n_channels", "rate", "options", "words"),
    [
        (6, 8000, ["--format", "mp3"], "6 channels, and mp3 at most 2: give another --format, or --mono"),
        (2, 96_000, ["--format", "mp3"], "96000 Hz, which mp3 can't hold: give another --format, or --mono"),
        (2, 8000, ["--format", "mp3", "--mono"], "2000 Hz, which mp3 can't hold: give another --format\n"),
        (9, 8000, ["--format", "flac"], "9 channels, and flac at most 8"),
        (1, 8000, ["--two-stems", "dragon"], "dragon"),
        (1, 8000, ["--two-stems", ""], "value is empty"),
        (1, 8000, ["--format", "ogg"], "ogg"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(
    model_dir: str, tmp_path: Path, capfd, n_channels: int, rate: int, options: list[str], words: str
) -> None:
    file = write(tmp_path / "duet.wav", sum(panned(rate, n_channels, 0.2).values()), rate)
    try:
        status = separate(file, "--model", model_dir, "--out", tmp_path / "out", *options)
    except SystemExit as stop:
        status = stop.code
    complaints = capfd.readouterr().err
    assert status == 2 and words in complaints and len(complaints.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_a_format_clips_is_told(model_dir: str, tmp_path: Path) -> None:
    file, out = write(tmp_path / "loud.wav", 8 * sum(panned(8000).values()), 8000), tmp_path / "out"
    for suffix, note in (("flac", "dog, violin: louder than full scale, where flac clips"), ("wav", "")):
        command = (file, "--model", model_dir, "--objects", "dog,violin", "--out", out, "--format", suffix)
        assert separate(*command) == 0
        said = json.loads((out / "separation.json").read_text())["note"]
        assert note in said and ("clips" in said) == bool(note)


# ---------------------------------------------------------------------------------- the pictures with a sound


def by_halves(file: Path, out: Path, **output: object) -> dict:
    """Separate a file by a separator of two objects that nobody sees, half of the sound each."""
    halves = Whole(lambda x, names: torch.stack([x / 2 for _ in names]), RATE, ("low", "high"))
    return commands.separate_file(str(file), None, str(out), None, None, VideoSeparator(halves), 1, Output(**output))


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", ["libx264", "-bf", "2", "-c:a", "aac"], "mp4"),
        ("late.mkv", ["libx264", "-c:a", "pcm_f32le"], "mp4"),
        ("late.ts", ["mpeg2video", "-c:a", "aac"], "mp4"),
        ("late.mov", ["mpeg4", "-bf", "2", "-c:a", "aac"], "mp4"),
        ("cut.mp4", ["libx264", "-bf", "2", "-g", "5", "-c:a", "aac"], "mp4"),
        ("clock.mkv", ["libx264", "-c:a", "aac"], "mp4"),
        ("a.webm", ["libvpx", "-c:a", "libopus"], "mkv"),
    ],
)
def test_pictures_are_untouched_and_stay_with_the_sound(
    tmp_path: Path, name: str, codec: list[str], container: str
) -> None:
    write(tmp_path / "duet.wav", sum(panned(8000).values()), 8000)
    picture = ["-f", "lavfi", "-i", "testsrc=s=32x32:r=25:d=4"]
    offset = ["-itsoffset", "0.7"] if "late" in name else []
    file, out = tmp_path / name, tmp_path / "out"
    sound = [*offset, "-i", tmp_path / "duet.wav", "-ar", "48000"]
    run_ffmpeg(*picture, *sound, "-c:v", *codec, "-pix_fmt", "yuv420p", file)
    if other := {"cut.mp4": ["-ss", "0.53"], "clock.mkv": ["-output_ts_offset", "5"]}.get(name):
        file = file.rename(tmp_path / f"whole{file.suffix}")
        run_ffmpeg("-i", file, *other, "-c", "copy", tmp_path / name)
        file = tmp_path / name
    report = by_halves(file, out, two_stems="low", video=True)
    shown_s, pictures = packets(file)
    zero_s = lag_s(decoded(file, tmp_path)[0], 2 * read(out / "low.wav")[0], 48_000)
    assert ("mp4 can't hold these pictures" in report["note"]) == (container == "mkv")
    for stem, video in (("low", "low"), ("no_low", "without_low")):
        written = out / f"{video}.{container}"
        assert written.name in report["files"]
        at_s, same = packets(written)
        assert same == pictures
        heard = decoded(written, tmp_path)
        later_s = lag_s(heard[0], read(out / f"{stem}.wav")[0], 48_000)
        assert heard.shape[0] == 2 and abs((at_s - later_s) - (shown_s - zero_s)) < 0.02


def test_a_sound_has_no_pictures_to_write(model_dir: str, tmp_path: Path, capfd) -> None:
    file, out = write(tmp_path / "duet.wav", sum(panned(8000).values()), 8000), tmp_path / "out"
    assert separate(file, "--model", model_dir, "--out", out, "--video") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "no video stream; give a file with pictures, or leave out --video" in line and not out.exists()


def test_each_object_gets_a_video_and_the_next_run_takes_it_away(tmp_path: Path) -> None:
    write(tmp_path / "duet.wav", sum(panned(8000, 6).values()), 8000)
    file, out = tmp_path / "surround.mp4", tmp_path / "out"
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=5:d=3"]
    run_ffmpeg(*picture, "-guess_layout_max", 8, "-i", tmp_path / "duet.wav", "-c:v", "mpeg4", "-c:a", "aac", file)
    by_halves(file, out, video=True)
    assert {"low.mp4", "high.mp4"} == {p.name for p in out.iterdir() if p.suffix == ".mp4"}
    assert decoded(out / "low.mp4", tmp_path).shape[0] == 6
    by_halves(file, out)
    assert not list(out.glob("*.mp4"))


def test_every_file_written_is_printed(model_dir: str, tmp_path: Path, capfd) -> None:
    write(tmp_path / "duet.wav", sum(panned(8000, 2, 1.0).values()), 8000)
    file, out = tmp_path / "duet.mp4", tmp_path / "out"
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=5:d=1"]
    run_ffmpeg(*picture, "-i", tmp_path / "duet.wav", "-c:v", "mpeg4", "-c:a", "aac", file)
    assert separate(file, "--model", model_dir, "--objects", "dog,violin", "--video", "--out", out) == 0
    said = capfd.readouterr().out
    written = {p.name for p in out.iterdir()} - {"relation_map.png"}
    assert {"dog.mp4", "violin.wav", "separation.json"} < written
    assert all(f"{out / name}" in said for name in written) and "of the sound, named" in said


@pytest.mark.parametrize(("n_channels", "held"), [(6, 6), (7, 2), (9, 1)])
def test_channels_that_a_video_cannot_hold_are_told(tmp_path: Path, n_channels: int, held: int) -> None:
    write(tmp_path / "duet.wav", sum(panned(8000, n_channels, 1.0).values()), 8000)
    file, out = tmp_path / "many.mkv", tmp_path / "out"
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=5:d=1"]
    layout = ["-guess_layout_max", 8] if n_channels < 9 else []
    run_ffmpeg(*picture, *layout, "-i", tmp_path / "duet.wav", "-c:v", "mpeg4", "-c:a", "pcm_s16le", file)
    note = by_halves(file, out, video=True)["note"]
    told = f"the videos' sound is mixed to {held} channel{'s' * (held > 1)}: AAC holds no {n_channels}"
    assert (told in note) == (held != n_channels)
    assert decoded(out / "low.mp4", tmp_path).shape[0] == held
    assert read(out / "low.wav").shape[0] == n_channels
