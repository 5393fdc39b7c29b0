import dataclasses
import pickle
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import scipy.signal
import soundfile

from avsep import synthetic
from avsep.nmf import kl_divergence
from avsep.objects import OBJECT_NAMES
from avsep.records import read_segments
from avsep.synthetic import SceneConfig, draw, plan_scene, planted_bases, render_scene

SHORT = SceneConfig(seconds=6)


def spectrum(sound: np.ndarray) -> np.ndarray:
    """Energy in thirds of an octave from 50 Hz up, as shares."""
    f, power = scipy.signal.welch(sound, 48_000, nperseg=4800)
    bands = np.digitize(f, 50 * 2 ** (np.arange(28) / 3))
    energy = np.bincount(bands, power, minlength=29)[1:]
    return energy / energy.sum()


def decode_audio(path: Path) -> np.ndarray:
    """Decode with ffmpeg itself, which heeds the container's edit list as players do."""
    executable = shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
    command = [executable, "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)


def decode_images(path: Path) -> np.ndarray:
    executable = shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
    command = [executable, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 240, 320, 3)


@pytest.mark.parametrize("name", [*synthetic.OBJECTS, *synthetic.OFFSCREEN])
def test_performances_have_the_stated_level_and_differ(name: str) -> None:
    sounds = [synthetic.performance(name, np.random.default_rng(seed)) for seed in range(4)]
    for sound in sounds:
        assert sound.shape == (480_000,) and sound.dtype == np.float32
        assert np.isfinite(sound).all() and np.abs(sound).max() < 1
        assert np.sqrt(np.mean(sound.astype(np.float64) ** 2)) == pytest.approx(0.1, rel=1e-3)
        frames = np.sqrt((sound.reshape(200, -1) ** 2).mean(1))
        assert (frames > 0.01).mean() > 0.15  # it sounds for some time, not in one knock
    again = synthetic.performance(name, np.random.default_rng(0))
    assert np.array_equal(sounds[0], again)
    shares = np.array([spectrum(s) for s in sounds])
    assert all(np.abs(shares[i] - shares[j]).sum() > 0.1 for i in range(4) for j in range(i))


def test_the_objects_share_the_spectrum() -> None:
    """No two objects lie in bands of their own: separating them by frequency alone would be trivial."""
    shares = {
        name: np.mean([spectrum(synthetic.performance(name, np.random.default_rng(seed), 4.0)) for seed in range(4)], 0)
        for name in synthetic.OBJECTS
    }
    for a in shares:
        for b in shares:
            assert np.minimum(shares[a], shares[b]).sum() > 0.1, (a, b)


def test_performance_explains_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="'kazoo' isn't played here; acoustic_guitar, violin"):
        synthetic.performance("kazoo", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"seconds is 0.5"):
        synthetic.performance("dog", np.random.default_rng(0), 0.5)


def test_every_object_has_its_name_and_the_offscreen_sounds_have_none() -> None:
    assert len(synthetic.OBJECTS) >= 6
    assert set(synthetic.OBJECTS) <= set(OBJECT_NAMES)
    assert not set(synthetic.OFFSCREEN) & set(OBJECT_NAMES)


def test_pictures_of_objects_differ_from_each_other_and_from_the_empty_scene() -> None:
    seen = {n: np.asarray(draw(n, np.random.default_rng(3))).astype(int) for n in (None, *synthetic.OBJECTS)}
    for image in seen.values():
        assert image.shape == (240, 320, 3)
    for name, image in seen.items():  # equal streams draw equal scenery: what differs is the object
        for other, its_image in seen.items():
            if name != other:
                differs = (np.abs(image - its_image).sum(-1) > 60).mean()
                assert differs > 0.02, (name, other)
    same = np.asarray(draw("dog", np.random.default_rng(3)))
    assert np.array_equal(same, seen["dog"])
    assert not np.array_equal(same, np.asarray(draw("dog", np.random.default_rng(4))))
    assert draw("flute", np.random.default_rng(0), (100, 200)).size == (100, 200)
    with pytest.raises(ValueError, match="'piano' can't be drawn"):
        draw("piano", np.random.default_rng(0))


def test_a_small_classifier_tells_the_pictures_apart() -> None:
    """Nearest neighbour on how strong edges are: well above chance (1/6) from 15 pictures an object."""

    def features(name: str, seed: int) -> np.ndarray:
        stream = np.random.default_rng([seed, synthetic.OBJECTS.index(name)])
        grey = np.asarray(draw(name, stream).convert("L"), float)
        edges = np.hypot(*np.gradient(grey))
        blocks = edges.reshape(12, 20, 16, 20).mean((1, 3))
        return np.sort(blocks, axis=None) / np.linalg.norm(blocks)

    train = np.array([[features(n, seed) for seed in range(15)] for n in synthetic.OBJECTS])
    hits = [
        np.abs(train - features(name, 100 + seed)).sum(-1).min(1).argmin() == row
        for row, name in enumerate(synthetic.OBJECTS)
        for seed in range(6)
    ]
    assert np.mean(hits) > 0.35


def test_sources_and_rest_sum_to_the_mix_exactly_in_any_order() -> None:
    for number in range(3):
        scene = render_scene(number, "train", 1, SHORT, n_objects=number + 1)
        parts = [*scene.sources.values(), scene.rest]
        assert tuple(scene.sources) == scene.plan.audible and len(scene.sources) == number + 1
        assert all(p.shape == (288_000,) and p.dtype == np.float32 for p in parts)
        assert np.array_equal(sum(parts), scene.mix)
        assert np.array_equal(sum(reversed(parts)), scene.mix)
        assert np.sqrt(np.mean(scene.mix**2)) > 10 ** (-26 / 20)
        assert np.abs(scene.mix).max() < 1


def test_a_clip_follows_from_seed_split_and_number() -> None:
    once, again = (render_scene(5, "val", 2, SHORT) for _ in range(2))
    assert once.plan == again.plan and np.array_equal(once.mix, again.mix)
    assert np.array_equal(synthetic.images(once.plan), synthetic.images(again.plan))
    for other in (
        render_scene(6, "val", 2, SHORT),
        render_scene(5, "val", 3, SHORT),
        render_scene(5, "test", 2, SHORT),
    ):
        assert other.plan.segment_id != once.plan.segment_id
        assert not np.array_equal(other.mix, once.mix)
    assert pickle.loads(pickle.dumps(once)).plan == once.plan


def test_splits_share_no_performance() -> None:
    """The same object, seed and number: another player in another room."""
    config = dataclasses.replace(SHORT, objects=("violin",), hidden_share=0, offscreen_share=0)
    sounds = [render_scene(0, split, 0, config, n_objects=1).mix for split in ("train", "val", "test")]
    for i in range(3):
        for j in range(i):
            a, b = sounds[i], sounds[j]
            peak = np.abs(scipy.signal.correlate(a, b, "full", "fft")).max()
            assert peak / np.sqrt((a**2).sum() * (b**2).sum()) < 0.7
            assert np.abs(spectrum(a) - spectrum(b)).sum() > 0.1


def test_shares_of_clips_are_as_configured() -> None:
    config = SceneConfig()
    plans = [plan_scene(number, "train", 0, config) for number in range(600)]

    def close(share: float, expected: float) -> bool:
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(plans))

    for n_objects, expected in enumerate(config.n_objects_shares, 1):
        assert close(np.mean([len(p.audible) == n_objects for p in plans]), expected)
    assert close(np.mean([bool(set(p.visible) - set(p.audible)) for p in plans]), config.silent_share)
    assert close(np.mean([bool(set(p.audible) - set(p.visible)) for p in plans]), config.hidden_share)
    assert close(np.mean([p.offscreen is not None for p in plans]), config.offscreen_share)
    for name in config.objects:
        expected = sum(share * n for n, share in enumerate(config.n_objects_shares, 1)) / len(config.objects)
        assert close(np.mean([name in p.audible for p in plans]), expected)
    assert all(len(plan_scene(n, "test", 0, config, n_objects=2).audible) == 2 for n in range(20))


def test_every_visible_object_is_close_up_for_two_seconds_and_cuts_fill_the_clip() -> None:
    for number in range(100):
        plan = plan_scene(number, "train", 0)
        assert plan.shots[0].start_s == 0 and plan.shots[-1].end_s == 10
        assert all(a.end_s == b.start_s < b.end_s for a, b in zip(plan.shots, plan.shots[1:], strict=False))
        assert {name for shot in plan.shots for name in shot.objects} == set(plan.visible)
        for name in plan.visible:
            assert sum(s.end_s - s.start_s for s in plan.shots if s.objects == (name,)) >= 2


def test_plan_scene_explains_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="split is 'dev'"):
        plan_scene(0, "dev", 0)
    with pytest.raises(ValueError, match="n_objects is 7; it must lie in 1…6"):
        plan_scene(0, "train", 0, n_objects=7)
    with pytest.raises(ValueError, match=r"\['piano'\] can't be rendered"):
        plan_scene(0, "train", 0, SceneConfig(objects=("piano",)))
    with pytest.raises(ValueError, match="count from 0"):
        plan_scene(-1, "train", 0)
    with pytest.raises(ValueError, match="3 s are too short"):
        plan_scene(0, "train", 0, SceneConfig(seconds=3, silent_share=0, hidden_share=0), n_objects=2)


def test_written_files_hold_the_scene_and_are_aligned(tmp_path: Path) -> None:
    segments = []
    for number in range(2):
        scene = render_scene(number, "test", 4, n_objects=2)
        segment = synthetic.write_scene(scene, tmp_path)
        segments.append(segment)
        references = tmp_path / "references" / segment.segment_id
        assert {p.name for p in references.iterdir()} == {f"{n}.flac" for n in (*scene.plan.audible, "_rest")}
        for name, sound in {**scene.sources, "_rest": scene.rest}.items():
            info = soundfile.info(references / f"{name}.flac")
            assert (info.samplerate, info.channels, info.subtype) == (48_000, 1, "PCM_24")
            assert np.array_equal(soundfile.read(references / f"{name}.flac", dtype="float32")[0], sound)

        decoded = decode_audio(tmp_path / segment.source)
        assert 480_000 <= len(decoded) <= 480_000 + 2 * 1024  # AAC comes in frames of 1024
        head = decoded[:480_000]
        correlation = scipy.signal.correlate(head, scene.mix, "full", "fft")
        assert abs(int(correlation.argmax()) - (len(scene.mix) - 1)) <= 1
        noise = head - scene.mix
        assert 10 * np.log10((scene.mix**2).mean() / (noise**2).mean()) > 20

        images = decode_images(tmp_path / segment.source)
        assert len(images) == 50
        assert np.abs(images - synthetic.images(scene.plan).astype(float)).mean() < 8
    synthetic.write_table(segments, tmp_path / "segments.csv")
    for read, written in zip(read_segments(str(tmp_path / "segments.csv")), segments, strict=True):
        assert read == dataclasses.replace(written, source=str(tmp_path / written.source))
        assert Path(read.source).exists() and read.labels is None


def test_planted_bases_multiply_to_v_and_belong_to_their_objects() -> None:
    planted = planted_bases(5, n_objects=4, objects_a_clip=3, variation=0.0)
    assert planted.V.shape == (5, 48, 40) and planted.W.shape == (5, 48, 6) and planted.H.shape == (5, 6, 40)
    assert (kl_divergence(planted.V, planted.W, planted.H).abs() < 1e-3).all()
    assert (planted.W.amax(1) == 1).all() and (planted.H >= 0).all()
    for labels, owners in zip(planted.labels, planted.object_of_basis, strict=True):
        assert labels.nonzero().flatten().tolist() == sorted(set(owners.tolist())) and labels.sum() == 3
        assert owners.bincount().max() == 2  # six bases, three objects
    columns = planted.W.mT.reshape(-1, 48)
    assert len(np.unique(columns.numpy().round(5), axis=0)) <= 8  # two spectra an object
    with pytest.raises(ValueError, match="objects_a_clip is 9"):
        planted_bases(1, objects_a_clip=9)
