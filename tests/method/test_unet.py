"""The U-Net beside the default: masks that share the sound out, training by mixtures of weakly labelled clips."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsep import evaluation
from avsep.learning import mixing
from avsep.metrics import si_sdr
from avsep.objects import AUDIOSET_23
from avsep.separation import Separates, Separator, render_whole
from avsep.stft import STFT
from avsep.unet import UNet, UNetConfig, UNetSeparator
from pipelines import evaluate
from tests.support.tones import RATE, model

TINY = UNetConfig(
    ("dog", "violin"), stft=STFT(RATE, 128, 64), knee_hz=200.0, top_hz=480.0, widths=(8, 16, 16), training={"clips": 0}
)


def untrained() -> UNetSeparator:
    torch.manual_seed(0)
    return UNetSeparator(TINY, UNet(TINY).eval())


def note(rng: np.random.Generator, name: str, rate: int, seconds: float = 4.0) -> np.ndarray:
    """A pulsed tone, of a dog low, of a violin high."""
    hz = rng.uniform(*{"dog": (70, 150), "violin": (250, 400)}[name])
    t = np.arange(int(rate * seconds)) / rate
    pulse = np.sin(2 * np.pi * (rng.uniform(1, 3) * t + rng.random())) > -0.3
    return (0.3 * pulse * np.sin(2 * np.pi * hz * t)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> UNetSeparator:
    """A U-Net that heard twelve solos and six duets, of which the labels say who plays, and two without any."""
    rng = np.random.default_rng(0)
    rate = mixing.halved(TINY.stft).sample_rate
    clips = [(0.01 * rng.standard_normal(4 * rate).astype(np.float32), [False, False]) for _ in range(2)]
    for i in range(18):
        played = [name for j, name in enumerate(TINY.objects) if i >= 12 or i % 2 == j]
        clips.append((sum(note(rng, n, rate) for n in played), [n in played for n in TINY.objects]))
    sounds = [mixing.LabelledSound.of(sound, labels) for sound, labels in clips]
    losses: list[float] = []
    network = mixing.train(
        sounds, TINY, lambda step: step / 40, batch=8, report=lambda _, loss, __: losses.append(loss)
    )
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    return UNetSeparator(TINY, network)


def test_what_it_learned_separates_tones_that_it_never_heard(trained: UNetSeparator) -> None:
    rng = np.random.default_rng(1)
    dog, violin = (note(rng, name, RATE) for name in TINY.objects)
    other = 0.05 * rng.standard_normal(len(dog)).astype(np.float32)
    _, parts = render_whole(trained, dog + violin + other, ["violin", "dog"])
    assert si_sdr(violin, parts[0]) > 10 and si_sdr(dog, parts[1]) > 10  # the mixture's are about 0


def test_an_object_that_nobody_names_is_the_rest_s(trained: UNetSeparator) -> None:
    rng = np.random.default_rng(2)
    dog, violin = (note(rng, name, RATE) for name in TINY.objects)
    plan, parts = render_whole(trained, dog + violin, ["dog"])
    assert plan.objects == ("dog",) and si_sdr(dog, parts[0]) > 2 and si_sdr(violin, parts[1]) > 2


@pytest.mark.parametrize("length", [1, 100, 5000, 60_000])
def test_estimates_and_rest_add_up_to_the_mixture(length: int) -> None:
    """Of sounds shorter than a window and longer than what the network is shown at once, too."""
    separator = untrained()
    x = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    for names in (["dog"], ["violin", "dog"], []):
        plan, parts = render_whole(separator, x, names)
        assert parts.shape == (len(names) + 1, length) and np.abs(parts.sum(0) - x).max() < 1e-5
        assert plan.confidence == dict.fromkeys(names, 1.0)
    assert isinstance(separator, Separates)


def test_masks_lie_between_nothing_and_all_and_sum_to_one() -> None:
    """Of silence, too; above the top they are as in the last band."""
    separator = untrained()
    for power in (torch.zeros(65, 300), torch.rand(65, 300) * torch.logspace(-20, 20, 300)):
        masks = separator.masks(power, ["violin"])
        assert masks.shape == (2, 65, 300) and masks.min() >= 0 and masks.max() <= 1 + 1e-6
        assert torch.allclose(masks.sum(0), torch.ones(65, 300), atol=1e-5)
        top = separator.bands.n_seen - 1
        assert torch.allclose(masks[:, top:], masks[:, top : top + 1].expand(-1, 65 - top, -1), atol=1e-6)


def test_what_is_told_alone_gets_a_mask() -> None:
    told = torch.tensor([[True, False], [False, False]])
    masks = untrained().network(torch.rand(2, 20, 33), told)
    assert masks.shape == (2, 3, 20, 33)
    assert (masks[0, 1] == 0).all() and (masks[1, :2] == 0).all() and (masks[1, 2] == 1).all() and masks[0, 0].max() > 0


def test_bands_are_bins_below_the_knee() -> None:
    """What is the same in all bins is the same in all bands, and there and back."""
    bands = UNetConfig(("dog",)).bands()
    assert bands.weights.shape[1] == 224 and torch.allclose(bands.weights.sum(1), torch.ones(2049))
    assert torch.allclose(bands.spread(bands.average(torch.ones(2049, 3))), torch.ones(2049, 3), atol=1e-5)
    tone = torch.zeros(2049, 1)
    tone[20] = 1  # 234 Hz
    assert bands.average(tone).argmax() == 20
    halves = UNetConfig(("dog",)).bands(mixing.halved(STFT(48_000, 4096, 2048)))
    assert halves.n_seen == bands.n_seen and torch.equal(halves.weights[: halves.n_seen], bands.weights[: bands.n_seen])


def test_a_mixture_s_parts_belong_to_those_who_are_told_of_them() -> None:
    """Parts sum to one; each told object is a member of one part at most, and of no other clip's."""
    rng = np.random.default_rng(0)
    bands = TINY.bands(mixing.halved(TINY.stft))
    labels = ([True, False], [False, True], [False, False])
    sounds = [mixing.LabelledSound.of(note(rng, "dog", 1000), list(marks)) for marks in labels]
    for _ in range(4):
        m = mixing.Mixer(sounds, bands, rng)(8)
        sums = m.parts.sum(1)
        assert torch.allclose(sums[m.power > 1e-9], torch.ones(()), atol=1e-4)
        assert (m.members[:, :-1].sum(1) <= 1).all() and (m.members[:, -1, -1] == 1).all()
        assert (m.told | (m.members[:, :, :-1].sum(1) == 0)).all()
        nobody_s = m.members.sum(2) == 0
        assert nobody_s.any() and not m.parts[nobody_s].any()


def test_clips_of_the_same_object_alone_are_mixed_with_silence() -> None:
    """Clips are never mixed with others of the same label; without a label there is nothing to learn."""
    rng = np.random.default_rng(0)
    dogs = [mixing.LabelledSound.of(note(rng, "dog", 1000), [True, False]) for _ in range(3)]
    m = mixing.Mixer(dogs, TINY.bands(mixing.halved(TINY.stft)), rng)(8)
    assert (m.members[:, :, 0].sum(1) <= 1).all() and not m.parts[:, 1:-1].any()
    nobody_s = [mixing.LabelledSound(dogs[0].samples, np.zeros(2, bool))]
    with pytest.raises(ValueError, match="none of 1 clips has a label"):
        mixing.train(nobody_s, TINY, float)


def test_it_is_the_same_when_it_was_saved(tmp_path: Path) -> None:
    separator, x = untrained(), torch.randn(3000)
    separator.save(tmp_path)
    again = UNetSeparator.load(tmp_path)
    assert again.config == separator.config and again.vocabulary is not None
    assert torch.equal(again.estimate(x, ["dog"]), separator.estimate(x, ["dog"]))
    (tmp_path / "unet.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no unet: "):
        UNetSeparator.load(tmp_path)
    (tmp_path / "unet.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no unet\.safetensors"):
        UNetSeparator.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"knee_hz": -1}, "knee_hz is -1; it must lie in 1.0…1000000.0"),
        ({"top_hz": float("nan")}, "top_hz is nan; it must lie in"),
        ({"top_hz": "high"}, "top_hz is 'high'; it must be of the type float"),
        ({"widths": []}, "widths is []; it must be 1 to 12 whole numbers in 1…2048"),
        ({"widths": [8, 0]}, "widths is [8, 0]; it must be 1 to 12 whole numbers"),
        ({"widths": 8}, "widths is 8; it must be of the type"),
        ({"objects": ["dog", "unicorn"]}, "objects names 'unicorn'; the vocabulary has "),
        ({"objects": ["dog", 5]}, "objects names 5; the vocabulary has "),
        ({"objects": []}, "objects is []; it must be one name or more, each once"),
        ({"objects": ["dog", "dog"]}, "objects is ['dog', 'dog']; it must be one name or more, each once"),
        ({"stft": {"sample_rate": 1000, "n_fft": 0, "hop_length": 1}}, "n_fft is 0; it must be"),
        ({"stft": {"sample_rate": 10**9, "n_fft": 128, "hop_length": 64}}, "stft.sample_rate is 1000000000; it must"),
        ({"stft": {"sample_rate": 1000}}, "stft.hop_length is missing"),
        ({"stft": 5}, "stft is 5; it must be of the type STFT"),
        ({"colour": "red"}, "colour is no setting of this version"),
    ],
)
def test_a_damaged_configuration_is_told_with_value_rule_and_remedy(tmp_path: Path, change: dict, told: str) -> None:
    untrained().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match="is no unet: ") as caught:
        UNetSeparator.load(tmp_path)
    line = str(caught.value)
    assert told in line and "\n" not in line and line.endswith("; copy the whole folder again, or train it again")


def test_evaluate_compares_it_with_a_model(tmp_path: Path) -> None:
    """As a row; in the place of the model it is refused."""
    model().save(tmp_path / "model")
    untrained().save(tmp_path / "unet")
    rng = np.random.default_rng(0)
    (tmp_path / "references" / "duet").mkdir(parents=True)
    sounds = {name: note(rng, name, RATE) for name in TINY.objects}
    for name, sound in sounds.items():
        soundfile.write(tmp_path / "references" / "duet" / f"{name}.wav", sound, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "duet.wav", sum(sounds.values()), RATE, subtype="FLOAT")
    (tmp_path / "clips.csv").write_text("segment_id,source,split\nduet,duet.wav,test\n")
    paths = {"model": "model", "segments": "clips.csv", "references": "references", "out": "out"}
    words = ["--in-process", *(w for name, path in paths.items() for w in (f"--{name}", str(tmp_path / path)))]
    assert evaluate.main([*words, "--compare", f"unet={tmp_path}/unet"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [n for n in found["separators"] if n not in evaluation.BESIDE] == ["default", "unet"]
    assert evaluate.main([*words, "--compare", f"unet={tmp_path}/unet"]) == 0  # the same again
    untrained_again = UNet(TINY)
    UNetSeparator(TINY, untrained_again).save(tmp_path / "unet")
    assert evaluate.main([*words, "--compare", f"unet={tmp_path}/unet"]) == 2  # other weights, other results
    shutil.rmtree(tmp_path / "out")
    assert evaluate.main([*words, "--model", str(tmp_path / "unet")]) == 2


def test_a_comparison_factorises_once_for_models_alone() -> None:
    separators = {"default": Separator(model()), "unet": untrained()}
    found = evaluation.together(separators)
    assert found["unet"] is separators["unet"] and isinstance(found["default"], Separator)
    assert found["unet"].vocabulary == AUDIOSET_23
