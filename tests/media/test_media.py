"""Real files, made here by ffmpeg, whose samples and frames are known in advance."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avsep import factors, files, media, stages
from avsep.media import DecodeLimits, decode, iter_audio, probe
from avsep.records import ClipError, Reason, Segment
from tests.support.processes import alive, children, own_children

RATE = 48_000
FPS = 25
CLICK = 144_123  # the sample, of ten seconds, that is not zero
CLICKS = f"aevalsrc='if(eq(n,{CLICK}),0.9,0)':s={RATE}:d=10"
COUNTING = "geq=lum='16+2*mod(N,100)':cb=128:cr=128"  # grey level tells the frame number modulo 100
FRAMES = f"color=s=64x48:r={FPS}:d=10,format=yuv420p,{COUNTING}"
X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "0", "-threads", "1"]

Make = Callable[..., Path]


def run_ffmpeg(*arguments: str | Path) -> None:
    command = [media.ffmpeg_executable(), "-y", "-v", "error", "-nostdin", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def make(folder: Path) -> Make:
    """Make a file of the folder from lavfi sources, once."""

    def make_file(name: str, sources: list[str], *options: str) -> Path:
        path = folder / name
        if not path.exists():
            inputs = [part for source in sources for part in ("-f", "lavfi", "-i", source)]
            run_ffmpeg(*inputs, *options, f"file:{path}")
        return path

    return make_file


@pytest.fixture(scope="session")
def movie(make: Make) -> Path:
    """Ten seconds; samples and frames are exact and known."""
    return make("movie.mov", [FRAMES, CLICKS], *X264, "-g", "100", "-bf", "2", "-c:a", "pcm_s16le")


@pytest.fixture(scope="session")
def film(make: Make) -> Path:
    """Ten seconds, index first, as the net has them."""
    return make("film.mp4", [FRAMES, CLICKS], *X264, "-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart")


def frame_numbers(images: np.ndarray) -> list[int]:
    """Read the frame numbers, modulo 100, off pictures of COUNTING."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    levels = images.reshape(len(images), -1).astype(float)
    assert (np.ptp(levels, axis=1) <= 2).all() if len(levels) else True
    return [round((level * 219 / 255) / 2) for level in levels.mean(1)] if len(levels) else []


def shown(start_s: float, n_images: int) -> list[int]:
    return [int(np.floor((start_s + i + 0.5) * FPS + 1e-9)) % 100 for i in range(n_images)]


def reason(path: Path, start_s: float = 0.0, end_s: float | None = None, limits: DecodeLimits | None = None) -> Reason:
    with pytest.raises(ClipError) as caught:
        decode(path, start_s, end_s, limits=limits or DecodeLimits())
    assert caught.value.detail and "\n" not in caught.value.detail and str(path) not in caught.value.detail
    assert caught.value.transient == (caught.value.reason == Reason.TIMEOUT)
    return caught.value.reason


def pipes() -> set[str]:
    """The pipes that this process has open."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return {link for link in links if link.startswith("pipe:")}


def test_whole_file(movie: Path) -> None:
    assert probe(movie) == media.MediaInfo(10.0, True, True, RATE, 64, 48, channels=1)
    clip = decode(movie)
    assert clip.waveform.shape == (480_000,) and clip.waveform.dtype == np.float32
    assert clip.sample_rate == RATE
    assert np.flatnonzero(clip.waveform).tolist() == [CLICK]
    assert clip.images.shape == (10, 256, 341, 3)
    assert frame_numbers(clip.images) == shown(0, 10)


@pytest.mark.parametrize("start_s,end_s", [(2.5, 6.5), (3.0, 4.0), (0.3, 3.5), (2.999, 9.75), (3.0025, 3.3)])
def test_excerpt_is_exact(movie: Path, start_s: float, end_s: float) -> None:
    clip = decode(movie, start_s, end_s)
    assert len(clip.waveform) == round((end_s - start_s) * RATE)
    assert np.flatnonzero(clip.waveform).tolist() == [CLICK - round(start_s * RATE)]
    n_images = int(np.ceil(end_s - start_s - 0.5))
    if n_images == 0:
        assert frame_numbers(clip.images) == [int(start_s * FPS)]
    else:
        assert frame_numbers(clip.images) == shown(start_s, n_images)


def test_compressed_excerpts(film: Path, make: Make) -> None:
    webm = make("film.webm", [FRAMES, CLICKS], "-c:v", "libvpx", "-cpu-used", "8", "-c:a", "libopus")
    for path, tolerance in ((film, 2), (webm, 50)):  # Matroska's clock ticks in milliseconds
        for start_s in (0.0, 1.5):
            clip = decode(path, start_s, 8.0)
            assert len(clip.waveform) == round((8 - start_s) * RATE)
            assert abs(np.abs(clip.waveform).argmax() - (CLICK - start_s * RATE)) <= tolerance
            assert len(clip.images) == int(np.ceil(7.5 - start_s))
    assert frame_numbers(decode(film, 1.5, 8.0).images) == shown(1.5, 6)


def test_ffmpeg_is_started_once(movie: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice for what isn't as most files are: here without pictures."""
    sound = make("sound.wav", [CLICKS])
    counting, count = tmp_path / "bin" / "ffmpeg", tmp_path / "count"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\necho >> {count}\nexec {media.ffmpeg_executable()} "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("PATH", f"{counting.parent}:{os.environ['PATH']}")
    for path, images, starts in ((movie, True, 1), (movie, False, 1), (sound, False, 1), (sound, True, 2)):
        count.unlink(missing_ok=True)
        decode(path, 0, 10, images=images)
        assert len(count.read_text()) == starts


def test_tags_are_not_ffmpegs_words(movie: Path, folder: Path) -> None:
    for name, words in (("mapping.mkv", "Stream mapping:"), ("memory.mkv", "Cannot allocate memory")):
        run_ffmpeg("-i", movie, "-c", "copy", "-metadata", f"comment=a\n{words}\n[info] {words}", folder / name)
        assert len(decode(folder / name).waveform) == 10 * RATE and probe(folder / name).has_video


def test_an_ffmpeg_that_cannot_run_is_not_the_files_fault(movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    if media.ffmpeg_executable() != "/nonexistent/ffmpeg":
        pytest.skip("the system has an ffmpeg of its own")
    with pytest.raises(OSError, match="nonexistent"):
        decode(movie)


def test_end_after_the_file(movie: Path) -> None:
    clip = decode(movie, 7.0, 25.0)
    assert len(clip.waveform) == 3 * RATE
    assert frame_numbers(clip.images) == shown(7.0, 3)


def test_start_after_the_end(movie: Path, make: Make) -> None:
    assert reason(movie, 10.0, 12.0) == Reason.PAST_END
    assert reason(movie, 100.0) == Reason.PAST_END
    raw = make("raw.aac", [CLICKS], "-c:a", "aac")  # its header doesn't tell the duration
    assert probe(raw).duration_s is None
    assert reason(raw, 15.0) == Reason.PAST_END


@pytest.mark.parametrize("times", [(-1.0, 2.0), (3.0, 3.0), (4.0, 3.0), (np.nan, None), (1.0, np.nan)])
def test_times_that_bound_nothing(movie: Path, times: tuple[float, float | None]) -> None:
    with pytest.raises(ValueError, match="excerpt"):
        decode(movie, *times)


def test_flac_in_matroska_is_bit_exact(folder: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 480_000).astype(np.int16)
    soundfile.write(folder / "noise.wav", samples, RATE)
    path = folder / "noise.mkv"
    run_ffmpeg("-i", folder / "noise.wav", "-f", "lavfi", "-i", FRAMES, "-c:a", "flac", *X264, path)
    expected = samples.astype(np.float32) / 2**15
    np.testing.assert_array_equal(decode(path).waveform, expected)
    np.testing.assert_array_equal(decode(path, 0.0, 7.25).waveform, expected[: round(7.25 * RATE)])
    blocks = list(iter_audio(path, sample_rate=RATE, block=7_001))
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    inner = decode(path, 3.0, 7.0).waveform  # unchanged too, but placed to the millisecond
    offset = min(range(-48, 49), key=lambda k: float(np.abs(inner - expected[144_000 + k :][:192_000]).max()))
    np.testing.assert_array_equal(inner, expected[144_000 + offset : 336_000 + offset])


def test_video_without_audio(make: Make) -> None:
    path = make("mute.mp4", ["testsrc=s=64x48:d=1"], *X264)
    assert not probe(path).has_audio and probe(path).has_video
    assert reason(path) == Reason.NO_AUDIO
    with pytest.raises(ClipError) as caught:
        list(iter_audio(path, sample_rate=RATE, block=100))
    assert caught.value.reason == Reason.NO_AUDIO


@pytest.mark.parametrize(("seconds", "shown_s"), [(3, 3), (65, 60)])
def test_a_mute_film_shows_its_pictures(make: Make, seconds: int, shown_s: int) -> None:
    path = make(f"mute-{seconds}.mp4", [f"testsrc=s=64x48:d={seconds}"], *X264)
    clip = decode(path, seconds - 3.0, sound=False)
    assert len(clip.waveform) == 0 and len(clip.images) == 3
    assert len(files.images(path, 48)[0]) == shown_s


def test_audio_without_video(make: Make) -> None:
    path = make("sound.flac", [CLICKS])
    assert probe(path) == media.MediaInfo(10.0, True, False, RATE, None, None, channels=1)
    clip = decode(path, 1.0, 6.0)
    assert np.flatnonzero(clip.waveform).tolist() == [CLICK - RATE]
    assert clip.images.shape == (0, 0, 0, 3) and clip.images.dtype == np.uint8


@pytest.mark.parametrize("suffix,codec", [("mp3", "libmp3lame"), ("m4a", "aac"), ("flac", "flac")])
def test_cover_art_is_no_video(make: Make, suffix: str, codec: str) -> None:
    path = make(
        f"cover.{suffix}", [CLICKS, "testsrc=s=64x48:r=1:d=1"], "-map", "0", "-map", "1", "-c:v", "mjpeg",
        "-pix_fmt", "yuvj420p", "-disposition:v", "attached_pic", "-c:a", codec,
    )  # fmt: skip
    assert probe(path).has_audio and not probe(path).has_video and probe(path).width is None
    clip = decode(path)
    assert abs(len(clip.waveform) - 480_000) < 3_000
    assert clip.images.shape == (0, 0, 0, 3)


@pytest.mark.parametrize("seconds,numbers", [(1.0, [12]), (0.3, [0]), (0.52, [12])])
def test_short_files(make: Make, seconds: float, numbers: list[int]) -> None:
    sources = [f"color=s=64x48:r={FPS}:d={seconds},format=yuv420p,{COUNTING}", f"sine=d={seconds}:r={RATE}"]
    clip = decode(make(f"short{seconds}.mov", sources, *X264, "-c:a", "pcm_s16le"))
    assert len(clip.waveform) == round(seconds * RATE)
    assert frame_numbers(clip.images) == numbers


def test_ten_minutes(make: Make) -> None:
    path = make("long.mkv", ["testsrc=s=32x32:r=2:d=600", f"sine=d=600:r={RATE // 6}"], *X264, "-c:a", "flac")
    clip = decode(path, 550.0, 560.0, sample_rate=RATE // 6)
    assert clip.waveform.shape == (80_000,) and clip.images.shape == (10, 256, 256, 3)
    clip = decode(path, sample_rate=RATE // 6, image_size=28)
    assert clip.waveform.shape == (4_800_000,) and clip.images.shape == (600, 28, 28, 3)
    tracemalloc.start()
    lengths = [len(samples) for samples in iter_audio(path, sample_rate=RATE, block=RATE)]  # 115 MB in all
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == pytest.approx(600 * RATE, abs=2) and set(lengths[:-1]) == {RATE}
    assert 0 < lengths[-1] <= RATE
    assert peak < 5e6
    assert reason(path, limits=DecodeLimits(max_duration_s=599)) == Reason.TOO_LONG
    assert reason(path, 10.0, 25.0, limits=DecodeLimits(max_duration_s=14)) == Reason.TOO_LONG


def test_too_long_without_a_duration_to_tell(make: Make) -> None:
    raw = make("raw.aac", [CLICKS], "-c:a", "aac")
    assert reason(raw, limits=DecodeLimits(max_duration_s=8)) == Reason.TOO_LONG
    assert len(decode(raw, 0.0, 8.0, limits=DecodeLimits(max_duration_s=8)).waveform) == 8 * RATE


def test_blocks_are_the_waveform(movie: Path) -> None:
    blocks = list(iter_audio(movie, sample_rate=16_000, block=7_777))
    np.testing.assert_array_equal(np.concatenate(blocks), decode(movie, sample_rate=16_000).waveform)
    with pytest.raises(ValueError, match="block"):
        next(iter_audio(movie, sample_rate=RATE, block=0))


def test_downmix(make: Make) -> None:
    tone = "0.5*sin(2*PI*440*t)"
    stereo = make("stereo.wav", [f"aevalsrc='{tone}|-{tone}':s={RATE}:d=1"], "-c:a", "pcm_f32le")
    assert decode(stereo).notes == ("left and right cancel each other: half their difference was taken",)
    np.testing.assert_allclose(
        decode(stereo).waveform, 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE), atol=1e-4
    )
    left = make("left.wav", [f"aevalsrc='{tone}|0':s={RATE}:d=1"], "-c:a", "pcm_f32le")
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(decode(left).waveform, expected, atol=1e-4)
    surround = make("centre.mkv", [f"aevalsrc='0|0|{tone}|0|0|0':c=5.1:s={RATE}:d=2"], "-c:a", "ac3")
    waveform = decode(surround).waveform
    assert abs(len(waveform) - 2 * RATE) < 2_000
    middle = np.fft.rfft(waveform[RATE // 2 : RATE // 2 + RATE])
    assert np.abs(middle).argmax() == 440 and np.abs(middle).max() > 0.1 * RATE / 2


def test_resampling(make: Make) -> None:
    path = make("cd.wav", ["sine=f=1000:d=3:r=44100"])
    assert probe(path).sample_rate == 44_100
    waveform = decode(path, 1.0, 2.0).waveform
    assert len(waveform) == RATE
    assert np.abs(np.fft.rfft(waveform)).argmax() == 1000


def test_variable_frame_rate(make: Make) -> None:
    kept = [n for n in range(250) if n < 50 or n % 70 == 0]
    path = make(
        "vfr.mkv", [f"{FRAMES},select='lt(n,50)+not(mod(n,70))'", CLICKS],
        "-fps_mode", "vfr", *X264, "-c:a", "flac",
    )  # fmt: skip

    def expected(start_s: float, n_images: int) -> list[int]:
        times = [start_s + i + 0.5 for i in range(n_images)]
        return [max(n for n in kept if n / FPS <= t) % 100 for t in times]

    assert frame_numbers(decode(path, 0.0, 8.4).images) == expected(0.0, 8)
    assert frame_numbers(decode(path, 4.0, 7.0).images) == expected(4.0, 3)  # from a frame of 2.8 s
    assert frame_numbers(decode(path, 4.1, 4.3).images) == [70]


def test_rotated_video_is_upright(make: Make, folder: Path) -> None:
    flat = make(
        "flat.mp4",
        ["color=s=96x64:d=1,format=yuv420p,geq=lum='if(lt(Y,32),235,16)':cb=128:cr=128", "sine=d=1"],
        *X264,
    )
    turned = folder / "turned.mp4"
    run_ffmpeg("-display_rotation:v", "90", "-i", flat, "-c", "copy", turned)
    image = decode(flat).images[0]
    assert image.shape == (256, 384, 3) and image[:120].min() > 240 and image[136:].max() < 15
    image = decode(turned).images[0]  # anticlockwise: the top is on the left
    assert image.shape == (384, 256, 3) and image[:, :120].min() > 240 and image[:, 136:].max() < 15


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(192, 96, (96, 192)), (96, 192, (192, 96)), (96, 80, (96, 115))]
)
def test_pictures_are_whole(make: Make, width: int, height: int, shape: tuple[int, int]) -> None:
    """A white frame of eight pixels is there on each side, whichever side is the longer one."""
    inside = f"between(X,8,{width - 9})*between(Y,8,{height - 9})"
    level = f"color=s={width}x{height}:d=1,format=yuv420p,geq=lum='if({inside},16,235)':cb=128:cr=128"
    path = make(f"framed{width}x{height}.mp4", [level, "sine=d=1"], *X264)
    image = decode(path, image_size=96).images[0, :, :, 0].astype(int)
    assert image.shape == shape
    edges = (image[:4], image[-4:], image[:, :4], image[:, -4:])
    assert all(edge.min() > 200 for edge in edges) and image[14:-14, 14:-14].max() < 40


def test_the_middle_of_a_very_wide_picture(make: Make) -> None:
    """Of 512x64 three times the height is kept, 96 columns on either side of the middle."""
    level = "color=s=512x64:d=1,format=yuv420p,geq=lum='if(between(X,176,335),16,235)':cb=128:cr=128"
    image = decode(make("strip.mp4", [level, "sine=d=1"], *X264), image_size=64).images[0, :, :, 0].astype(int)
    assert image.shape == (64, 192)
    assert image[:, 20:172].max() < 40 and image[:, :12].min() > 200 and image[:, -12:].min() > 200


def test_late_audio_stays_in_sync(movie: Path, folder: Path) -> None:
    path = folder / "late.mkv"
    run_ffmpeg(
        "-i", movie, "-itsoffset", "2", "-i", movie, "-map", "0:v", "-map", "1:a",
        "-c:v", "copy", "-c:a", "flac", path,
    )  # fmt: skip
    clip = decode(path)
    assert len(clip.waveform) == 12 * RATE
    assert np.flatnonzero(clip.waveform).tolist() == [CLICK + 2 * RATE]
    assert frame_numbers(clip.images) == shown(0, 10)
    clip = decode(path, 1.0, 7.0)
    assert np.flatnonzero(clip.waveform).tolist() == [CLICK + RATE]
    assert frame_numbers(clip.images) == shown(1, 6)


def test_gaps_are_silence(make: Make) -> None:
    path = make("gap.mkv", [f"{CLICKS},aselect='not(between(t,1,2.5))'"], "-c:a", "flac")
    waveform = decode(path).waveform
    assert len(waveform) == pytest.approx(480_000, abs=48)
    assert np.flatnonzero(waveform).tolist() == [pytest.approx(CLICK, abs=48)]


def test_streams_of_different_lengths(make: Make) -> None:
    still = make("still.mov", [FRAMES, f"sine=d=4:r={RATE}"], *X264, "-c:a", "pcm_s16le")
    clip = decode(still)
    assert len(clip.waveform) == 4 * RATE and len(clip.images) == 10
    assert sum(map(len, iter_audio(still, sample_rate=RATE, block=RATE))) == 4 * RATE
    assert reason(still, 6.0, 9.0) == Reason.EMPTY
    dark = make("dark.mov", [f"{FRAMES},trim=end=4", CLICKS], *X264, "-c:a", "pcm_s16le")
    clip = decode(dark)
    assert len(clip.waveform) == 10 * RATE and frame_numbers(clip.images) == shown(0, 4)
    assert decode(dark, 6.0, 9.0).images.shape == (0, 0, 0, 3)


def test_without_pictures_the_sound_is_the_same(movie: Path, make: Make) -> None:
    clip = decode(movie, 2.3, 5.1, images=False)
    assert np.array_equal(clip.waveform, decode(movie, 2.3, 5.1).waveform) and len(clip.images) == 0
    late = make("quiet_end.mkv", [FRAMES, "sine=r=48000:d=4"], *X264, "-c:a", "flac")
    clip = decode(late, images=False)  # the pictures go on, so nothing is missing
    assert np.array_equal(clip.waveform, decode(late).waveform)


def test_transport_stream(make: Make) -> None:
    """No index, a late first timestamp, key frames four seconds apart, a change of size."""
    path = make("stream.ts", [FRAMES, CLICKS], *X264, "-g", "100", "-c:a", "aac")
    clip = decode(path, 2.5, 6.5)
    assert frame_numbers(clip.images) == shown(2.5 - 0.0213, 4)  # time starts with the codec's 1024 samples
    assert abs(np.abs(clip.waveform).argmax() - (CLICK - 2.5 * RATE + 1024)) < 10
    small = make("small.ts", ["color=white:s=64x48:d=5", f"sine=d=5:r={RATE}"], *X264, "-c:a", "aac")
    large = make(
        "large.ts", ["color=gray:s=96x96:d=5", f"sine=d=5:r={RATE}"],
        *X264, "-c:a", "aac", "-output_ts_offset", "5",
    )  # fmt: skip
    both = small.parent / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    images = decode(both).images
    assert len(images) == 10
    assert images[:5].min() > 240 and 100 < images[5:].min() <= images[5:].max() < 150


def cut(path: Path, name: str, fraction: float) -> Path:
    data = path.read_bytes()
    path.with_name(name).write_bytes(data[: round(fraction * len(data))])
    return path.with_name(name)


def test_truncated_files(film: Path, make: Make) -> None:
    matroska = make("film.mkv", [FRAMES, CLICKS], *X264, "-c:a", "aac")
    sound = make("tone.flac", [f"sine=d=10:r={RATE}"])
    for path in (film, matroska, sound):
        half = cut(path, f"half-{path.name}", 0.6)
        assert reason(half) == Reason.TRUNCATED
        assert reason(half, 1.0, 9.5) == Reason.TRUNCATED
        assert len(decode(half, 1.0, 3.0).waveform) == 2 * RATE
        heard = 0
        with pytest.raises(ClipError) as caught:
            for samples in iter_audio(half, sample_rate=RATE, block=RATE):
                heard += len(samples)
        assert caught.value.reason == Reason.TRUNCATED
        assert 3 * RATE < heard < 9 * RATE


def test_unreadable_files(movie: Path, folder: Path, tmp_path: Path) -> None:
    assert reason(cut(movie, "no-moov.mov", 0.6)) == Reason.UNREADABLE
    text = tmp_path / "text.mp4"
    text.write_text("This is not a film.\n" * 100)
    assert reason(text) == Reason.UNREADABLE
    assert reason(tmp_path) == Reason.UNREADABLE
    assert reason(tmp_path / "nothing.mp4") == Reason.MISSING
    assert reason(text / "nothing.mp4") == Reason.MISSING
    (tmp_path / "empty.mp4").touch()
    assert reason(tmp_path / "empty.mp4") == Reason.EMPTY
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    assert reason(tmp_path / "empty.wav") in (Reason.EMPTY, Reason.UNREADABLE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    assert reason(tmp_path / "nan.wav") == Reason.UNREADABLE
    for path in (text, tmp_path, tmp_path / "nothing.mp4"):
        with pytest.raises(ClipError):
            probe(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_samples_that_no_sound_has(tmp_path: Path, value: float) -> None:
    samples = np.zeros(48_000, np.float32)
    samples[40_000] = value
    soundfile.write(tmp_path / "x.wav", samples, 48_000, subtype="FLOAT")
    assert reason(tmp_path / "x.wav") == Reason.UNREADABLE
    with pytest.raises(ClipError, match="not finite numbers, or above"):
        list(iter_audio(tmp_path / "x.wav", sample_rate=48_000, block=10_000))


def test_garbage_inside(film: Path, tmp_path: Path) -> None:
    data = bytearray(film.read_bytes())
    start = data.index(b"mdat") + 100
    data[start:] = np.random.default_rng(0).bytes(len(data) - start)
    path = tmp_path / "garbage.mp4"
    path.write_bytes(data)
    assert reason(path) in (Reason.UNREADABLE, Reason.TRUNCATED)


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat"])
def test_playlists_are_rejected(film: Path, make: Make, tmp_path: Path, name: str) -> None:
    stream = make("stream.ts", [FRAMES, CLICKS], *X264, "-g", "100", "-c:a", "aac")
    (tmp_path / "stream.ts").write_bytes(stream.read_bytes())
    concat = "ffconcat version 1.0\nfile stream.ts\n"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nstream.ts\n#EXT-X-ENDLIST\n"
    path = tmp_path / name
    path.write_text(hls if name == "list.m3u8" else concat)
    run_ffmpeg("-i", path, "-t", "1", "-f", "null", "-")  # ffmpeg itself would follow it
    assert reason(path) == Reason.UNREADABLE
    path.write_text(hls)
    assert reason(path) == Reason.UNREADABLE


def test_limits(movie: Path) -> None:
    assert reason(movie, limits=DecodeLimits(max_pixels=64 * 48 - 1)) == Reason.TOO_LARGE
    assert len(decode(movie, limits=DecodeLimits(max_pixels=64 * 48)).images) == 10
    assert reason(movie, limits=DecodeLimits(timeout_s=0.001)) == Reason.TIMEOUT
    for bits in (13, 19, 21, 26):  # some are too few to load ffmpeg's libraries, or ffmpeg itself
        with pytest.raises(ClipError):
            decode(movie, limits=DecodeLimits(max_memory_bytes=1 << bits))
    assert not own_children()


def test_timeout_leaves_no_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    started = time.monotonic()
    assert reason(tmp_path / "fifo.mp4", limits=DecodeLimits(timeout_s=0.5)) == Reason.TIMEOUT
    with pytest.raises(ClipError) as caught:
        probe(tmp_path / "fifo.mp4", timeout_s=0.5)
    assert caught.value.transient
    assert 1.0 <= time.monotonic() - started < 10
    assert not own_children()


def test_abandoned_iteration_leaves_no_process(make: Make) -> None:
    path = make("long.mkv", ["testsrc=s=32x32:r=2:d=600", f"sine=d=600:r={RATE // 6}"], *X264, "-c:a", "flac")
    before = pipes()
    blocks = iter_audio(path, sample_rate=RATE, block=RATE)
    next(blocks)
    assert len(own_children()) == 1
    assert isinstance(blocks, Iterator)
    del blocks
    assert not own_children()
    assert not pipes() - before


def test_ffmpeg_dies_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    code = "import sys, pathlib, avsep.media as m; m.probe(pathlib.Path(sys.argv[1]), timeout_s=60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "fifo.mp4")]) as parent:
        for _ in range(300):
            if started := children(parent.pid):
                break
            time.sleep(0.1)
        assert len(started) == 1
        time.sleep(0.3)
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not alive(min(started)):
            break
        time.sleep(0.1)
    else:
        os.kill(min(started), signal.SIGKILL)
        pytest.fail("ffmpeg outlived its parent")


@pytest.mark.parametrize("name", ["-i.mov", "http:x %03d.mov", "zoë 音 'q' [0],;.mov", "@x|y.mov"])
def test_awkward_names(movie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"./{name}").write_bytes(movie.read_bytes())
    assert len(decode(Path(name), 0.0, 1.0).waveform) == RATE
    assert next(iter_audio(tmp_path / name, sample_rate=RATE, block=10)).shape == (10,)


def tone(samples: np.ndarray, rate: int = RATE) -> int:
    """Return the loudest frequency in Hz."""
    return round(int(np.abs(np.fft.rfft(samples)).argmax()) * rate / len(samples))


@pytest.fixture(scope="session")
def whole(make: Make) -> Path:
    """Three seconds of H.264 and AAC."""
    return make("whole.mp4", [f"testsrc=s=64x48:r={FPS}:d=3", f"sine=440:d=3:r={RATE}"], *X264, "-c:a", "aac")


SUBTITLES = "1\n00:00:00,500 --> 00:00:01,000\nfirst\n\n2\n00:00:02,500 --> 00:00:09,000\nlast\n"
CHAPTERS = ";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=9000\ntitle=one\n"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text.mkv", ["-c:s", "srt"]),
        ("text.mp4", ["-c:s", "mov_text"]),
        ("sound-and-text.mkv", ["-vn", "-c:s", "ass"]),
        ("chapter.mp4", ["-map", "0", "-map_metadata", "2"]),
    ],
)
def test_other_streams_may_outlast_the_sound(whole: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    (tmp_path / "a.srt").write_text(SUBTITLES)
    (tmp_path / "a.txt").write_text(CHAPTERS)
    path = tmp_path / name
    run_ffmpeg("-i", whole, "-i", tmp_path / "a.srt", "-i", tmp_path / "a.txt", "-c", "copy", *options, path)
    clip = decode(path)
    assert len(clip.waveform) == pytest.approx(3 * RATE, abs=2048) and not clip.notes
    assert len(decode(path, images=False).waveform) == len(clip.waveform)
    assert sum(map(len, iter_audio(path, sample_rate=RATE, block=RATE))) == len(clip.waveform)
    assert reason(path, 4.0, 8.0) in (Reason.PAST_END, Reason.EMPTY)
    if name.endswith("mkv"):
        assert reason(cut(path, f"cut-{name}", 0.4)) == Reason.TRUNCATED


def test_a_header_that_promises_too_much(whole: Path, tmp_path: Path) -> None:
    """A file that ends cleanly is all there is, though its header says otherwise."""
    path = tmp_path / "long.mkv"
    run_ffmpeg("-i", whole, "-c", "copy", path)
    data = path.read_bytes()
    place = data.index(b"\x44\x89\x88") + 3  # EBML's Duration, a float64 of milliseconds
    for promised_s in (9.0, 36_000.0):
        path.write_bytes(data[:place] + struct.pack(">d", 1000 * promised_s) + data[place + 8 :])
        clip = decode(path)
        assert len(clip.waveform) == pytest.approx(3 * RATE, abs=2048)
        assert clip.notes == (f"the header promises {promised_s:.2f} s; the file ends at 3.00 s",)
        assert sum(map(len, iter_audio(path, sample_rate=RATE, block=RATE))) == len(clip.waveform)
    assert reason(cut(path, "cut.mkv", 0.5)) == Reason.TRUNCATED
    assert reason(path, 5.0, 8.0) == Reason.PAST_END


def wav(path: Path, samples: np.ndarray, n_bytes: int | None = None, fact: int | None = None) -> Path:
    """Write 16-bit mono PCM as WAVEFORMATEXTENSIBLE, with what the header says of its length."""
    data = samples.astype("<i2").tobytes()
    size = len(data) if n_bytes is None else n_bytes
    kind = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4)
    kind += bytes.fromhex("0100000000001000800000aa00389b71")
    chunks = b"WAVEfmt " + struct.pack("<I", len(kind)) + kind
    chunks += b"" if fact is None else b"fact" + struct.pack("<II", 4, fact)
    riff = b"RIFF" + struct.pack("<I", min(size + 60, 2**32 - 1))
    path.write_bytes(riff + chunks + b"data" + struct.pack("<I", size) + data)
    return path


@pytest.mark.parametrize(
    ("n_bytes", "fact"),
    [
        (0x7FFFF000, 0x7FFFF000 // 2),
        (0x7FFFF000, 0x7FFFF000),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, None),
        (0x80000000, 0x7FFFFFFF),
        (0, 0),
    ],
)
def test_lengths_that_were_never_filled_in(tmp_path: Path, n_bytes: int, fact: int | None) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 2 * RATE)
    path = wav(tmp_path / "pipe.wav", samples, n_bytes, fact)
    np.testing.assert_array_equal(decode(path).waveform, samples.astype(np.float32) / 2**15)
    np.testing.assert_array_equal(decode(path, limits=DecodeLimits(max_duration_s=3)).waveform, decode(path).waveform)


def test_bare_samples_are_cut_where_their_header_says_more(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 2 * RATE)
    assert reason(wav(tmp_path / "half.wav", samples, 8 * RATE, 4 * RATE)) == Reason.TRUNCATED
    clip = decode(wav(tmp_path / "perhaps.wav", samples, 8 * RATE - 2))
    assert len(clip.waveform) == 2 * RATE
    assert clip.notes == ("the file ends in the middle of its data, at 2.00 s: it may have been cut",)


def test_a_file_of_two_milliseconds(tmp_path: Path) -> None:
    path = wav(tmp_path / "short.wav", np.arange(96))
    assert len(decode(path).waveform) == 96


def parts(make: Make, suffix: str, *options: str, rates: tuple[int, int] = (48_000, 44_100)) -> list[bytes]:
    """Two files of two seconds, 440 Hz mono and 880 Hz stereo, of different rates."""
    name = f"{options[-1]}-{rates[0]}-{rates[1]}.{suffix}"
    first = make(f"first-{name}", [f"sine=440:d=2:r={rates[0]}"], *options)
    stereo = f"sine=880:d=2:r={rates[1]},aformat=channel_layouts=stereo"
    later = ["-output_ts_offset", "2"] if suffix == "ts" else []
    second = make(f"second-{name}", [stereo], *options, *later)
    return [first.read_bytes(), second.read_bytes()]


@pytest.mark.parametrize(
    ("suffix", "options", "rates"),
    [
        ("ts", ["-c:a", "aac"], (48_000, 48_000)),
        ("ts", ["-c:a", "mp2"], (48_000, 44_100)),
        ("aac", ["-c:a", "aac"], (48_000, 44_100)),
        ("aac", ["-c:a", "aac"], (44_100, 48_000)),
        ("mp3", ["-c:a", "libmp3lame", "-write_xing", "0"], (48_000, 44_100)),
        ("flac", ["-c:a", "flac"], (48_000, 44_100)),
        ("ogg", ["-c:a", "libvorbis"], (48_000, 44_100)),
        ("opus", ["-c:a", "libopus"], (48_000, 48_000)),
    ],
)
def test_parameters_that_change_on_the_way(
    make: Make, tmp_path: Path, suffix: str, options: list[str], rates: tuple[int, int]
) -> None:
    first, second = parts(make, suffix, *options, rates=rates)
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(first + second)
    waveform = decode(path, images=False).waveform
    assert len(waveform) == pytest.approx(4 * RATE, abs=0.25 * RATE)
    assert tone(waveform[: int(1.9 * RATE)]) == 440 and tone(waveform[int(2.2 * RATE) : 4 * RATE]) == 880
    quiet = np.abs(waveform[: 4 * RATE - 4800].reshape(-1, 480)).max(1) < 0.01
    assert quiet.sum() < 12  # a codec's run-up, no hole
    blocks = list(iter_audio(path, sample_rate=RATE, block=5_001))
    np.testing.assert_array_equal(np.concatenate(blocks), waveform)
    assert tone(decode(path, 0.5, 3.5, images=False).waveform[2 * RATE :]) == 880


def test_an_ogg_chain_of_many_links(make: Make, tmp_path: Path) -> None:
    """Links that follow each other alike are read by ffmpeg; each that differs starts another."""
    first, second = parts(make, "ogg", "-c:a", "libvorbis")
    path = tmp_path / "chain.ogg"
    path.write_bytes(first + first + second + first)
    waveform = decode(path).waveform
    assert len(waveform) == pytest.approx(8 * RATE, abs=0.1 * RATE)
    heard = [tone(waveform[int(k * RATE) : int((k + 1.5) * RATE)]) for k in (0.1, 2.2, 4.2, 6.2)]
    assert heard == [440, 440, 880, 440]
    np.testing.assert_array_equal(decode(path, 4.5, 5.5).waveform, waveform[int(4.5 * RATE) : int(5.5 * RATE)])
    np.testing.assert_array_equal(np.concatenate(list(iter_audio(path, sample_rate=RATE, block=999))), waveform)
    assert reason(path, limits=DecodeLimits(max_duration_s=5)) == Reason.TOO_LONG
    data = path.read_bytes()
    path.write_bytes(data[: len(first) + 2000] + bytes(len(data) - len(first) - 2000))
    assert reason(path) in (Reason.TRUNCATED, Reason.UNREADABLE)


def test_gaps_stay_where_parameters_change(make: Make, tmp_path: Path) -> None:
    first, _ = parts(make, "ts", "-c:a", "aac", rates=(48_000, 48_000))
    stereo = "sine=880:d=2:r=48000,aformat=channel_layouts=stereo"
    late = make("late.ts", [stereo], "-c:a", "aac", "-output_ts_offset", "3")
    path = tmp_path / "gap.ts"
    path.write_bytes(first + late.read_bytes())
    waveform = decode(path).waveform
    assert len(waveform) == pytest.approx(5 * RATE, abs=0.1 * RATE)
    assert not np.abs(waveform[int(2.1 * RATE) : int(2.8 * RATE)]).any()


def test_pictures_that_fail_leave_the_sound(whole: Path, movie: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.mp4"
    run_ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=14", odd)
    data = bytearray(movie.read_bytes())
    start = data.index(b"avcC")
    data[start + 4 : start + 40] = bytes(36)
    broken = tmp_path / "broken.mov"
    broken.write_bytes(data)
    for path, source in ((odd, whole), (broken, movie)):
        clips = [decode(path) for _ in range(3)]
        assert all(np.array_equal(c.waveform, decode(source).waveform) for c in clips)
        assert not any(len(c.images) for c in clips)
        assert len({c.notes for c in clips}) == 1 and clips[0].notes[0].startswith("the pictures can't be used: ")
        with pytest.raises(ClipError):
            decode(path, sound=False)


def test_sound_that_fails_leaves_the_pictures(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    start = data.index(b"esds")
    data[start - 20 : start + 40] = bytes(60)
    path = tmp_path / "mute.mp4"
    path.write_bytes(data)
    assert len(decode(path, sound=False).images) == 3
    with pytest.raises(ClipError):
        decode(path)


def test_a_stream_that_says_it_is_empty(tmp_path: Path) -> None:
    """RF64 written to a pipe has no length anywhere."""
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, RATE)
    path = wav(tmp_path / "plain.wav", samples)
    command = [media.ffmpeg_executable(), "-v", "error", "-i", path, "-rf64", "always", "-f", "wav", "-"]
    piped = tmp_path / "piped.wav"
    piped.write_bytes(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    np.testing.assert_array_equal(decode(piped).waveform, decode(path).waveform)
    assert sum(map(len, iter_audio(piped, sample_rate=RATE, block=RATE))) == RATE


TONE = "0.4*sin(2*PI*440*t)"


def channels(n: int, sounding: int) -> str:
    return "|".join(TONE if i == sounding else "0" for i in range(n))


@pytest.mark.parametrize(
    ("layout", "n", "sounding", "level"),
    [
        ("9 channels", 9, 8, 0.4 / 9),
        ("3 channels", 3, 2, 0.4 / 3),  # which is no effects channel, unless it is said to be
        ("7.1.4", 12, 11, 0.4 / 12),
        ("22.2", 24, 23, 0.4 / 24),
        ("binaural", 2, 1, 0.2),
        ("hexadecagonal", 16, 15, 0.4 / 16),
    ],
)
def test_no_channel_is_lost(tmp_path: Path, layout: str, n: int, sounding: int, level: float) -> None:
    samples = np.zeros((RATE, n))
    samples[:, sounding] = 0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT", format="WAV")
    if not layout.endswith("channels"):
        path = tmp_path / "a.mka"
        run_ffmpeg("-channel_layout", layout, "-i", tmp_path / "a.wav", "-c:a", "pcm_f32le", path)
    waveform = decode(path).waveform
    assert tone(waveform) == 440 and np.abs(waveform).max() == pytest.approx(level, rel=0.01)


def test_ambisonics_are_heard_by_an_omnidirectional_microphone(make: Make) -> None:
    sound = f"aevalsrc='{TONE}|0.3*sin(2*PI*1000*t)|0|0':c=4.0:s={RATE}:d=1"
    layout = "channelmap=map=0|1|2|3:channel_layout=ambisonic 1"
    path = make(
        "ambisonic.mkv", [sound, FRAMES], "-af", layout, "-c:a", "libopus", "-mapping_family", "2", *X264, "-t", "1"
    )
    clip = decode(path)
    spectrum = np.abs(np.fft.rfft(clip.waveform[:RATE]))
    assert spectrum.argmax() == 440 and spectrum[1000] < 0.05 * spectrum[440] and len(clip.images) == 1


@pytest.mark.parametrize("options", [["-c:a", "aac"], ["-c:a", "libmp3lame"], ["-c:a", "libopus"]])
def test_channels_that_cancel(make: Make, options: list[str]) -> None:
    path = make(f"opposite-{options[1]}.mkv", [f"aevalsrc='{TONE}|-{TONE}':s={RATE}:d=1"], *options)
    clip = decode(path)
    assert tone(clip.waveform) == 440 and np.abs(clip.waveform).max() == pytest.approx(0.4, rel=0.1)
    assert clip.notes == ("left and right cancel each other: half their difference was taken",)
    listening, notes = media.listen(path)
    blocks = list(iter_audio(path, sample_rate=RATE, block=RATE, listening=listening))
    np.testing.assert_array_equal(np.concatenate(blocks), clip.waveform)
    assert notes == clip.notes


def test_an_effects_channel_alone(make: Make) -> None:
    clip = decode(make("effects.wav", [f"aevalsrc='0|0|0|{TONE}|0|0':c=5.1:s={RATE}:d=1"]))
    assert tone(clip.waveform) == 440
    assert clip.notes == ("the mix of the channels (5.1) is silent: they were added with alternating signs",)


def test_a_silent_track_before_another(make: Make) -> None:
    path = make(
        "tracks.mov", [FRAMES, f"anullsrc=r={RATE}:d=2", f"aevalsrc='{TONE}':s={RATE}:d=2"],
        "-map", "0", "-map", "1", "-map", "2", "-t", "2", *X264, "-c:a", "pcm_s16le", "-metadata:s:a:1", "language=ger",
    )  # fmt: skip
    silent = decode(path)
    assert not silent.waveform.any()
    assert silent.notes == ("audio track 1 is silent; the file's others are 2 (pcm_s16le, mono, ger)",)
    assert media.listen(path)[1] == silent.notes
    heard = decode(path, track=2)
    assert tone(heard.waveform) == 440 and not heard.notes and len(heard.images) == 2
    assert not media.listen(path, track=2)[1]
    with pytest.raises(ClipError, match="no_audio: no audio track 3; the file has 2"):
        decode(path, track=3)
    with pytest.raises(ValueError, match="counted from 1"):
        decode(path, track=0)
    assert decode(make("nothing.wav", [f"anullsrc=r={RATE}:d=1"])).notes == ("the sound is silent",)


@pytest.mark.parametrize("suffix", ["sf", "caf", "sox", "mlp", "rso", "w64", "mxf"])
def test_what_ffmpeg_reads_is_read(make: Make, suffix: str) -> None:
    sources = [f"aevalsrc='{TONE}':s={RATE}:d=1", *(["testsrc=s=64x48:r=25:d=1"] if suffix == "mxf" else [])]
    options = {"sf": ["-f", "ircam"], "mlp": ["-strict", "-2"]}.get(suffix, [])
    path = make(f"kind.{suffix}", sources, *options)
    assert tone(decode(path).waveform[: int(0.9 * RATE)]) == pytest.approx(440, abs=1)


def test_pictures_without_a_container_are_read(make: Make) -> None:
    assert len(decode(make("kind.y4m", ["testsrc=s=64x48:r=25:d=1,format=yuv420p"]), sound=False).images) == 1


def test_a_file_is_heard_alike_held_or_read_in_blocks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("opposite-aac.mkv", [f"aevalsrc='{TONE}|-{TONE}':s={RATE}:d=1"], "-c:a", "aac")
    held = files.WholeFile(path, RATE, 64, files.FileLimits())
    monkeypatch.setattr(files, "HELD_S", 0.5)
    read = files.WholeFile(path, RATE, 64, files.FileLimits())
    np.testing.assert_array_equal(np.concatenate(list(read.blocks())), next(held.blocks()))
    assert read.notes == held.notes == ("left and right cancel each other: half their difference was taken",)


def test_a_rejection_says_why_nothing_is_heard_or_seen(make: Make, whole: Path, tmp_path: Path) -> None:
    silent = make(
        "nothing.mka", [f"anullsrc=r={RATE}:d=1", f"sine=d=1:r={RATE}"], "-map", "0", "-map", "1", "-c:a", "flac"
    )
    odd = tmp_path / "odd.mp4"
    run_ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=14", odd)
    with pytest.raises(ClipError, match=r"silent: .*; audio track 1 is silent; the file's others are 2"):
        stages.decode(Segment("a", str(silent), labels=("violin",)), factors.ExtractionConfig())
    with pytest.raises(ClipError, match=r"no_video: .*; the pictures can't be used: Impossible to convert"):
        stages.decode(Segment("a", str(odd)), factors.ExtractionConfig())
    assert len(stages.decode(Segment("a", str(odd), labels=("violin",)), factors.ExtractionConfig()).clip.waveform)
