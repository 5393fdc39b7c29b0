"""A separator is a value: one without bases and network is measured, and used, like a trained model."""

import csv
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from avsep import baselines, commands, evaluation, metrics, results, results_report
from avsep.factors import ExtractionConfig, factorize
from avsep.objects import AUDIOSET_23
from avsep.records import Segment
from avsep.report import Report
from avsep.separation import Separates, Separator, Whole, render_whole
from avsep.synthetic import performance
from avsep.videos import VideoSeparator
from pipelines import evaluate
from tests.support.tones import DOG, RATE, VIOLIN, model, tone


@dataclass
class Bands:
    """What is below 450 Hz is a dog, what is above is a violin."""

    sample_rate: int = RATE
    objects: tuple[str, ...] = ("dog", "violin")
    confidence: dict[str, float] = field(default_factory=lambda: {"dog": 0.9, "violin": 0.9})
    silent: tuple[str, ...] = ()
    explanation: None = None

    def plan(self, blocks: Iterable[NDArray], objects: Sequence[str] | None = None, seen: object = None) -> "Bands":
        return Bands(objects=tuple(objects or self.objects))

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        sound = np.concatenate(list(blocks))
        low = np.fft.rfft(sound)
        low[np.fft.rfftfreq(len(sound), 1 / RATE) > 450] = 0
        dog = np.fft.irfft(low, len(sound)).astype(np.float32)
        parts = [{"dog": dog, "violin": sound - dog}[name] for name in self.objects]
        yield np.stack([*parts, sound - sum(parts)])


def duet(seconds: float = 3.0) -> evaluation.Case:
    dog, violin = tone(DOG, seconds) / 4, tone(VIOLIN, seconds, 2.0) / 4
    segment = Segment("duet", "nowhere.wav", 0.0, None, "test")
    return evaluation.Case(
        segment,
        dog + violin,
        ["dog", "violin"],
        torch.stack([dog, violin]),
        torch.zeros(len(dog)),
        vocabulary=AUDIOSET_23,
    )


def test_a_separator_of_one_s_own_is_measured_beside_the_others() -> None:
    case, separators = duet(), {"default": Separator(model()), "bands": Bands()}
    assert all(isinstance(s, Separates) for s in separators.values())
    clip = evaluation.measure(case, separators)
    assert list(clip.figures) == ["mixture", "nmf_clustering", "default", "bands", "oracle_assignment", "ideal_mask"]
    found = results.summarize([clip])
    assert found["separators"]["bands"]["mean"]["si_sdr"] > 25 > found["separators"]["mixture"]["mean"]["si_sdr"]
    rows = list(csv.DictReader(io.StringIO(results.clip_table([clip]))))
    figures = [float(r["sdr"]) for r in rows if (r["clip"], r["separator"]) == ("duet", "bands")]
    assert len(rows) == 12 and figures == clip.figures["bands"]["sdr"]
    report = Report("all")
    results_report.add_results(report, found, "objects")
    for name, separator in separators.items():
        section = results_report.clip_section([case.segment], case, separator, clip=clip)
        assert ("Relation map" in section.html()) == (name == "default")
        report.append(section)
    assert "<td>bands</td>" in report.html()


def test_true_owners_have_the_masks_and_looks_of_the_model() -> None:
    """So what they bring beyond it is lost by assignment alone, and they stay its ceiling."""
    rng = np.random.default_rng(0)
    sounds = [performance(name, rng, 4.0)[:: 48_000 // RATE] for name in ("flute", "babble")]
    references = torch.from_numpy(np.stack(sounds).astype(np.float32))
    case = replace(duet(4.0), mixture=references.sum(0), references=references)
    found = []
    for settings in ({"second_look": False, "fine_masks": False, "mask_power": 1.5}, {"second_look": False}, {}):
        separator = Separator(model(**settings))
        bases = separator.analyse(case.mixture).factors
        found.append(evaluation.truly_assigned(case, bases, separator.stft, separator))
    coarse, _ = baselines.oracle_assignment(case.mixture, case.everything, bases, separator.stft)
    assert torch.allclose(found[0], coarse, atol=1e-5)
    assert all(torch.allclose(x.sum(0), case.mixture, atol=1e-5) for x in found)
    first, second = (metrics.si_sdr(references.numpy(), x[:-1].numpy()).mean() for x in found[1:])
    assert second > first + 0.5


def test_true_owners_look_once_where_the_published_method_does() -> None:
    case, separator = duet(), Separator(model(assignment="threshold", mask_power=1.5))
    bases = separator.analyse(case.mixture).factors
    once, _ = baselines.oracle_assignment(case.mixture, case.everything, bases, separator.stft)
    assert torch.allclose(evaluation.truly_assigned(case, bases, separator.stft, separator), once, atol=1e-5)


def test_a_separator_of_one_s_own_separates_files(tmp_path: Path) -> None:
    """Where a model did before, whose relation map goes; the report leaves out what there isn't."""
    mixture, out = duet().mixture.numpy(), tmp_path / "out"
    soundfile.write(tmp_path / "duet.wav", mixture, RATE, subtype="FLOAT")
    mine = VideoSeparator(Bands())
    for separate_video in (VideoSeparator(Separator(model())), mine):
        report = commands.separate_file(str(tmp_path / "duet.wav"), None, str(out), None, None, separate_video)
    assert {p.name for p in out.iterdir()} == {"dog.wav", "violin.wav", "_rest.wav", "separation.json"}
    assert np.abs(sum(soundfile.read(p)[0] for p in out.glob("*.wav")) - mixture).max() < 1e-6
    assert json.loads((out / "separation.json").read_text()) == report and not {"bases", "relation_map"} & set(report)
    assert [o["name"] for o in report["objects"]] == ["dog", "violin"] and report["windows"] == []
    assert sum(o["sound_score"] for o in report["objects"]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="bases are 'own', and this separator has no bases"):
        mine(tmp_path / "duet.wav", out, bases="own")


def test_without_any_model_there_is_a_floor_and_a_ceiling() -> None:
    clip = evaluation.measure(duet(), {"default": Bands()}, "none")
    sdr = {name: np.mean(f["sdr"]) for name, f in clip.figures.items()}
    assert sdr["mixture"] < 1 and min(sdr["oracle_assignment"], sdr["ideal_mask"], sdr["default"]) > 10
    assert clip.confidence == {"dog": 0.9, "violin": 0.9} and clip.sound_scores == {}
    assert np.isnan(results.summarize([clip])["map"])
    with pytest.raises(ValueError, match="separators are named mixture"):
        evaluation.measure(duet(), {"mixture": Bands()})


def test_a_function_of_a_whole_sound_is_a_separator() -> None:
    """What its estimates leave is the rest, however the sound arrives."""
    halves = Whole(lambda x, names: torch.stack([x / 2 for _ in names]), RATE, ("dog", "violin"))
    x = np.random.default_rng(0).standard_normal(2_500_000).astype(np.float32)
    plan, parts = render_whole(halves, x, ["dog"])
    assert plan.objects == ("dog",) and np.array_equal(parts[0], x / 2) and np.allclose(parts.sum(0), x)
    with pytest.raises(ValueError, match="objects are cat; this separator knows dog, violin"):
        halves.plan([x], ["cat"])


# ---------------------------------------------------------------------------------- work done elsewhere


def test_windows_can_be_factorised_elsewhere() -> None:
    asked: list[list[int]] = []
    own = Separator(model())

    def elsewhere(waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], how: ExtractionConfig) -> Future:
        asked.append(list(seeds))
        done: Future = Future()
        done.set_result([factorize(w, s, how) for w, s in zip(waveforms, seeds, strict=True)])
        return done

    mixture = duet(5.0).mixture
    there = Separator(model(), factorize=elsewhere)(mixture, ["dog"])
    assert torch.equal(there.estimates, own(mixture, ["dog"]).estimates)
    assert asked == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [DOG], [DOG], [DOG]]  # the second look's last


def test_waiting_for_others_ends_with_the_work(tmp_path: Path) -> None:
    class Late(Exception):
        pass

    never: Future = Future()
    begun: list[float] = []

    def elsewhere(waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], how: ExtractionConfig) -> Future:
        begun.append(time.monotonic())
        return never

    def step(stage: str, done: float) -> None:
        if begun and time.monotonic() > begun[0] + 0.3:
            raise Late

    soundfile.write(tmp_path / "duet.wav", duet().mixture.numpy(), RATE)
    separate = VideoSeparator(Separator(model())).elsewhere(None, elsewhere)
    with pytest.raises(Late):
        separate(tmp_path / "duet.wav", tmp_path / "out", ["dog"], step=step)
    assert never.cancelled() and len(begun) == 1


# ---------------------------------------------------------------------------------- evaluate --compare


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """What `evaluate` needs to measure one duet: a table, its references, a model."""
    case = duet()
    model().save(tmp_path / "model")
    model(mask_power=1.0).save(tmp_path / "other")
    (tmp_path / "references" / "duet").mkdir(parents=True)
    for name, sound in zip(case.names, case.references.numpy(), strict=True):
        soundfile.write(tmp_path / "references" / "duet" / f"{name}.wav", sound, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "duet.wav", case.mixture.numpy(), RATE, subtype="FLOAT")
    (tmp_path / "clips.csv").write_text("segment_id,source,split\nduet,duet.wav,test\n")
    paths = {"model": "model", "segments": "clips.csv", "references": "references", "out": "out"}
    return ["--in-process", *(word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path)))]


def test_other_models_are_compared_under_their_names(arguments: list[str], tmp_path: Path) -> None:
    both = ["--compare", f"same={tmp_path}/model", "--compare", f"other={tmp_path}/other"]
    assert evaluate.main([*arguments, *both]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [n for n in found["separators"] if n not in evaluation.BESIDE] == ["default", "same", "other"]
    figures = found["clips"][0]["figures"]
    assert figures["same"] == figures["default"] != figures["other"]
    with (tmp_path / "out" / "clips.csv").open(newline="") as f:
        rows = {(r["clip"], r["separator"], r["object"]): float(r["sdr"]) for r in csv.DictReader(f)}
    assert rows["duet", "other", "violin"] == figures["other"]["sdr"][1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>same</td>" in page and "<td>other</td>" in page
    assert evaluate.main(arguments) == 2  # results of other models are there


@pytest.mark.parametrize(
    ("compared", "words"),
    [
        (["mine"], "--compare mine: give NAME=DIR"),
        (["Mine=MODEL"], "--compare Mine=.*small letters"),
        (["ideal_mask=MODEL"], "ideal_mask is the name of another"),
        (["mine=MODEL", "mine=MODEL"], "mine is the name of another"),
        (["paper=MODEL"], "paper is the name of another"),
        (["mine=nowhere"], "nowhere holds no config.json"),
    ],
)
def test_names_and_folders_that_cannot_be_compared_are_told(arguments, tmp_path, capfd, compared, words) -> None:
    given = [word for c in compared for word in ("--compare", c.replace("MODEL", str(tmp_path / "model")))]
    assert evaluate.main([*arguments, *given]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("pipelines.evaluate: ") and re.search(words, line), line
