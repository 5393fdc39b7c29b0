"""A file or an array in, arrays out."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

import avsep
from avsep.edits import Edits
from avsep.records import ClipError
from tests.support.tones import DOG, RATE, VIOLIN, model, tone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("separated")
    model().save(str(folder / "model"))
    dog, violin = tone(DOG, 3.0).numpy() / 4, tone(VIOLIN, 3.0, 2.0).numpy() / 4
    left_right = np.stack([dog + violin, dog + 0.5 * violin], 1).repeat(2, 0)  # at twice the rate: an octave lower
    soundfile.write(folder / "duet.wav", left_right, 2 * RATE, subtype="FLOAT")
    return folder


def test_a_file_gives_sounds_by_name_in_its_own_channels_and_rate(folder: Path, tmp_path: Path) -> None:
    whole, rate = soundfile.read(folder / "duet.wav", dtype="float32")
    s = avsep.separate_file(folder / "duet.wav", ["dog", "violin"], folder / "model")
    assert list(s) == ["dog", "violin", "_rest"] and s.objects == ("dog", "violin") and len(s) == 3
    for sound in s.values():
        assert sound.samples.shape == whole.T.shape and sound.samples.dtype == np.float32
        assert sound.sample_rate == rate == s.sample_rate
    assert np.abs(sum(x.samples for x in s.values()) - whole.T).max() < 1e-5
    assert s["Violins"] is s["violin"] and s.report["objects"][0]["name"] == "dog"
    assert repr(s).startswith("<Separated 3.0 s at 4000 Hz: dog ")
    with pytest.raises(KeyError, match="'cat' is not in this separation; there are dog, violin, _rest"):
        s["cat"]
    for name in ("v.wav", "v.FLAC"):
        s["violin"].save(tmp_path / name)
        saved, saved_rate = soundfile.read(tmp_path / name, dtype="float32")
        assert saved_rate == rate and np.abs(saved.T - s["violin"].samples).max() < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.FLAC", "v.wav"]


def test_an_array_gives_what_its_file_gives(folder: Path) -> None:
    whole, rate = soundfile.read(folder / "duet.wav", dtype="float32")
    of_file = avsep.separate_file(folder / "duet.wav", ["dog"], folder / "model")
    of_array = avsep.separate_sound(whole.T, rate, ["dog"], folder / "model")
    assert np.array_equal(of_file["dog"].samples, of_array["dog"].samples)
    assert avsep.separate_sound(whole[:, 0], rate, ["dog"], folder / "model")["dog"].samples.shape == (1, len(whole))


def test_edits_are_made_and_mono_is_the_models_rate(folder: Path) -> None:
    s = avsep.separate_file(folder / "duet.wav", ["dog"], folder / "model", mono=True, edits=Edits(remove=("dog",)))
    assert list(s) == ["_rest"] and s["_rest"].sample_rate == RATE and len(s["_rest"].samples) == 1


def test_mistakes_are_told_in_a_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.mp4"):
        avsep.separate_file(tmp_path / "nosuch.mp4", model=folder / "model")
    with pytest.raises(ValueError, match="unknown object 'unicorn'"):
        avsep.separate_file(folder / "duet.wav", ["unicorn"], folder / "model")
    with pytest.raises(ValueError, match=r"the samples are \(9, 2\); give \(S,\) or \(C, S\)"):
        avsep.separate_sound(np.zeros((9, 2)), 8000)
    with pytest.raises(ValueError, match="NaN or infinity"):
        avsep.separate_sound(np.full(9000, np.nan), 8000)
    loud = avsep.separated.Sound(np.full((1, 800), 2.0, np.float32), 8000)
    with pytest.raises(ValueError, match=r"x.ogg: the suffix must be .wav, .flac, .mp3"):
        loud.save(tmp_path / "x.ogg")
    with pytest.raises(OSError, match="can't be written"):
        loud.save(tmp_path / "nosuch" / "x.wav")
    with pytest.warns(UserWarning, match="louder than full scale, where flac clips"):
        loud.save(tmp_path / "x.flac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loud.save(tmp_path / "x.wav")
    assert soundfile.read(tmp_path / "x.wav")[0].max() == 2.0


def test_a_file_without_sound_is_told_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / "miml.safetensors").write_bytes(b"cut")
    (tmp_path / "text.mp4").write_text("no media")
    with pytest.raises(ClipError, match="unreadable"):
        avsep.separate_file(tmp_path / "text.mp4", model=tmp_path / "damaged")
