"""A factoriser is a value: another one than the default serves extraction, practice and separation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsep import factors
from avsep.factors import FACTORIZERS, DataConfig, ExtractionConfig, factorize, factorize_clips
from avsep.learning.practice import Solo, mix_solos
from avsep.model import Model
from avsep.objects import AUDIOSET_23
from avsep.records import Segment, validate
from avsep.separation import Separator
from avsep.stages import extract_record
from tests.support import euclidean
from tests.support.tones import DOG, RATE, SMALL, VIOLIN, model, tone

CONFIG = ExtractionConfig(stft=SMALL, n_bases=4, n_iter=30)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> ExtractionConfig:
    monkeypatch.setitem(FACTORIZERS, "euclidean", euclidean)
    return replace(CONFIG, factorizer="euclidean")


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [*FACTORIZERS.values(), euclidean])
def test_every_factoriser_keeps_the_contract(method: factors.Factorizer) -> None:
    """Of maximum one, alike in any batch, lower with each iteration; what was factorised is found again."""
    V = torch.stack([random(20, 30), torch.zeros(20, 30), random(20, 4) @ random(4, 30)])
    W, H = method.factorize(V, 4, n_iter=50, seeds=[1, 2, 3])
    assert W.shape == (3, 20, 4) and H.shape == (3, 4, 30) and W.dtype == H.dtype == torch.float32
    assert W.amax(1).flatten().tolist() == pytest.approx([1] * 4 + [0] * 4 + [1] * 4) and not H[1].any()
    for clip, seed in enumerate((1, 2, 3)):
        alone = method.factorize(V[clip], 4, n_iter=50, seeds=seed)
        assert all(torch.allclose(a, b[clip], atol=1e-3) for a, b in zip(alone, (W, H), strict=True))
    left = [method.divergence(V[0], *method.factorize(V[0], 4, n_iter=n, seeds=1)) for n in (0, 5, 20, 80)]
    assert left == sorted(left, reverse=True) and float(method.divergence(V[2], W[2], H[2])) < left[0] / 20
    found = method.infer_activations(V[2], W[2], n_iter=300)
    assert float(method.divergence(V[2], W[2], found)) <= float(method.divergence(V[2], W[2], H[2])) * 1.05
    silent = torch.cat([W[2], torch.zeros(20, 1)], 1)
    assert not method.infer_activations(V[2], silent, n_iter=5)[4].any()
    with pytest.raises(ValueError, match="must be finite and non-negative"):
        method.factorize(-V, 4, n_iter=1, seeds=0)


def test_a_clip_is_extracted_by_the_factoriser_of_its_configuration(other: ExtractionConfig, tmp_path: Path) -> None:
    mixture = ((tone(DOG, 1.0) + tone(VIOLIN, 1.0)) / 4).numpy()
    soundfile.write(tmp_path / "duet.wav", mixture, RATE, subtype="FLOAT")
    segment = Segment("duet", str(tmp_path / "duet.wav"), labels=("dog", "violin"))
    record, default = extract_record(segment, other, None), extract_record(segment, CONFIG, None)
    validate(record)
    V = SMALL(torch.from_numpy(mixture)).abs()
    W, H = euclidean.factorize(V, 4, n_iter=30, seeds=factors.seed_of("duet"))
    assert record.kl_divergence == pytest.approx(float(euclidean.divergence(V, W, H)), rel=1e-3)
    np.testing.assert_allclose(record.bases.astype(float), W, atol=2e-3)
    assert np.abs(record.bases.astype(float) - default.bases).max() > 0.05
    (together,) = factorize_clips([mixture], [factors.seed_of("duet")], other, "cpu")
    torch.testing.assert_close(together.W, W, atol=1e-3, rtol=0)


def test_a_model_separates_by_the_factoriser_of_its_clips(other: ExtractionConfig, tmp_path: Path) -> None:
    """Its factors, those at the finer masks' resolution, and a dictionary's activations; kept with the model."""
    dog, violin = tone(DOG, 3.0), tone(VIOLIN, 3.0, 2.0)
    made = model()
    config = replace(made.config, extraction=replace(made.config.extraction, factorizer="euclidean"))
    Model(config, made.network).save(tmp_path)
    separator, default = Separator.load(tmp_path), Separator(made)
    assert separator.extraction.factorizer == "euclidean"
    found, usual = separator(dog + violin, ["dog", "violin"]), default(dog + violin, ["dog", "violin"])
    for reference, estimate in zip((dog, violin), found.estimates, strict=True):
        assert float(10 * torch.log10(reference.square().sum() / (estimate - reference).square().sum())) > 12
    assert not torch.allclose(found.estimates, usual.estimates, atol=1e-4)
    window = separator.analyse((dog + violin)[: 2 * RATE])
    expected = factorize((dog + violin)[: 2 * RATE], 0, separator.extraction)
    assert torch.equal(window.factors.W[:, : separator.extraction.n_bases], expected.W)


def test_practice_mixtures_are_made_as_the_clips_are(other: ExtractionConfig) -> None:
    solos = [Solo(i, random(40, 2) + i, random(2, 25)) for i in range(3)]
    usual, found = (mix_solos(solos, 3, 60, 4, 25, 1, 20, name) for name in ("kl_nmf", "euclidean"))
    assert torch.equal(usual.present, found.present) and not torch.equal(usual.bases, found.bases)
    assert torch.equal(usual.bases, mix_solos(solos, 3, 60, 4, 25, 1, 20).bases)


def test_an_unknown_factoriser_is_refused_in_one_line(other: ExtractionConfig, tmp_path: Path) -> None:
    expected = "unknown factorizer 'nosuch'; the factorizers are kl_nmf, .*euclidean"
    with pytest.raises(ValueError, match=expected):
        ExtractionConfig(factorizer="nosuch")
    model().save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["extraction"]["factorizer"] = "nosuch"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=expected) as caught:
        Model.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_only_another_factoriser_changes_what_is_stored(other: ExtractionConfig) -> None:
    """Clips of before there was a choice stay those of the default."""
    assert "factorizer" not in CONFIG.as_dict() and other.as_dict()["factorizer"] == "euclidean"
    for config in (CONFIG, other):
        assert DataConfig.from_dict(DataConfig(config, AUDIOSET_23).as_dict()).extraction == config
