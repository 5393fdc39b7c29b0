"""Corrections by hand: the value, and what then sounds."""

import json
import math
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avsep.edits import Edits, Move, Span
from avsep.factors import ExtractionConfig, Factors, factorize
from avsep.miml import basis_posteriors
from avsep.objects import AUDIOSET_23, REST
from avsep.separation import Assigned, Separator, assignments
from avsep.separation.assigned import followed
from avsep.separation.masks import at_least
from tests.support.tones import DOG, RATE, VIOLIN, model, tone

SECONDS = 5.0  # of which a window has 2: three windows


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return (tone(DOG, SECONDS) + tone(VIOLIN, SECONDS, 2.0)).numpy()


@pytest.fixture(scope="module")
def assigned(sound: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Assigned:
    """As it is kept: read from its file."""
    file = tmp_path_factory.mktemp("assigned") / "bases.zip"
    Separator(model(n_factorizations=2)).plan([sound], ["dog", "violin"]).assigned.write(file)
    return Assigned.read(file)


def rendered(assigned: Assigned, sound: np.ndarray, edits: Edits) -> dict[str, np.ndarray]:
    plan = assigned.edited(edits)
    parts = np.concatenate(list(plan.render(np.array_split(sound, 3))), 1)
    assert np.abs(parts.sum(0) - sound).max() < 1e-5  # in every sample
    return dict(zip([*plan.objects, REST], parts, strict=True))


def everywhere(assigned: Assigned, to: str) -> Edits:
    return Edits(tuple(Move(k, m, to) for k in range(len(assigned.windows)) for m in range(assigned.how.n_bases)))


# ------------------------------------------------------------------------------- what then sounds


def test_no_edits_change_nothing_and_a_file_holds_all(assigned: Assigned, sound: np.ndarray, tmp_path: Path) -> None:
    plan = Separator(model(n_factorizations=2)).plan([sound], ["dog", "violin"])
    first = np.concatenate(list(plan.render([sound])), 1)
    again = rendered(assigned, sound, Edits())
    assert list(again) == ["dog", "violin", "_rest"] and not assigned.edited(Edits()).silent
    assert np.abs(np.stack(list(again.values())) - first).max() < 1e-6
    assigned.write(tmp_path / "again.zip")
    assert (again["dog"] == rendered(Assigned.read(tmp_path / "again.zip"), sound, Edits())["dog"]).all()
    assert (tmp_path / "again.zip").stat().st_size < 100_000


def test_bases_that_were_kept_before_there_was_a_second_look_are_read(sound: np.ndarray, tmp_path: Path) -> None:
    plan = Separator(model(second_look=False)).plan([sound], ["dog", "violin"])
    plan.assigned.write(tmp_path / "now.zip")
    with zipfile.ZipFile(tmp_path / "now.zip") as now, zipfile.ZipFile(tmp_path / "then.zip", "w") as then:
        for name in now.namelist():
            data = now.read(name)
            if name == "about.json":
                about = json.loads(data)
                about["windows"] = [span[:3] for span in about["windows"]]
                data = json.dumps(about).encode()
            then.writestr(name, data)
    both = [rendered(Assigned.read(tmp_path / f"{n}.zip"), sound, Edits()) for n in ("now", "then")]
    assert (both[0]["dog"] == both[1]["dog"]).all()


def test_what_is_held_in_memory_renders_every_edit_bit_for_bit(assigned: Assigned, sound: np.ndarray) -> None:
    held = assigned.held()
    for edits in (Edits(), everywhere(assigned, "cat"), Edits((Move(0, 1, REST), Move(2, 0, "dog"))), Edits()):
        fresh = rendered(assigned, sound, edits)
        again = rendered(held, sound, edits)
        assert list(fresh) == list(again) and all((fresh[n] == again[n]).all() for n in fresh)
    assert all(window.fine(torch.empty(0), held.how)[0].any() for window in held.windows)  # kept: not fitted to this


@pytest.mark.parametrize("to", ["violin", "cat", REST])
def test_moving_all_bases_moves_all_sound(assigned: Assigned, sound: np.ndarray, to: str) -> None:
    edits = everywhere(assigned, to)
    parts = rendered(assigned, sound, edits)
    assert np.abs(parts.pop(to) - sound).max() < 1e-4
    assert all(np.abs(part).max() < 1e-4 for part in parts.values())
    assert assigned.edited(edits).silent == tuple(n for n in edits.objects(assigned.objects) if n != to)
    scores = assigned.edited(edits).sound_scores
    assert scores.get(to, 1.0) == pytest.approx(1.0) and sum(scores.values()) == pytest.approx(float(to != REST))


def test_a_moved_basis_takes_its_sound_along_and_no_other_window_changes(assigned: Assigned, sound: np.ndarray) -> None:
    before = rendered(assigned, sound, Edits())
    listed = assignments(assigned.edited(Edits()).shares[0], assigned.edited(Edits()).basis_energies[0], *_of(assigned))
    loudest = next(entry for entry in listed if entry["object"] == "dog")
    after = rendered(assigned, sound, Edits((Move(0, loudest["basis"], "violin"),)))
    energy = {n: float(np.square(x[:RATE]).sum()) for n, x in after.items()}
    assert (
        energy["violin"] > np.square(before["violin"][:RATE]).sum()
        and energy["dog"] < np.square(before["dog"][:RATE]).sum()
    )
    last = slice(int(2.1 * RATE), None)
    assert np.abs(after["dog"][last] - before["dog"][last]).max() < 1e-6


def _of(assigned: Assigned) -> tuple[tuple[str, ...], int]:
    return assigned.objects, assigned.how.n_bases


def test_an_object_taken_away_leaves_its_sound_to_the_others(assigned: Assigned, sound: np.ndarray) -> None:
    edits = Edits(remove=("dog",))
    for number, window in enumerate(assigned.windows):
        (piece,) = assigned.pieces(number, window, edits)
        dog, violin, rest = window.shares
        others = (violin + rest).clamp_min(1e-30)
        expected = torch.where(violin + rest > 1e-6, violin / others, 0.0)  # in proportion; else all to the rest
        assert torch.allclose(piece.shares, torch.stack([expected, 1 - expected]), atol=1e-5) and dog.any()
    assert list(rendered(assigned, sound, edits)) == ["violin", "_rest"]
    nobody = rendered(assigned, sound, Edits(remove=("dog", "violin")))
    assert list(nobody) == ["_rest"] and np.abs(nobody["_rest"] - sound).max() < 1e-6


def test_an_object_added_gets_its_least_share(assigned: Assigned, sound: np.ndarray) -> None:
    scores = assigned.edited(Edits(add=("cat",))).sound_scores
    assert scores["cat"] == pytest.approx(assigned.how.least_share / 3, rel=0.05)
    rendered(assigned, sound, Edits(add=("cat",)))


def test_a_span_without_an_object_silences_it_there_and_only_there(assigned: Assigned, sound: np.ndarray) -> None:
    before = rendered(assigned, sound, Edits())
    edits = Edits((Move(0, 0, "dog"),), spans=(Span(1.0, 3.0, "dog", False),))  # the span has the last word
    after = rendered(assigned, sound, edits)
    inside, outside = slice(int(1.1 * RATE), int(2.9 * RATE)), slice(int(3.2 * RATE), None)
    assert np.abs(after["dog"][inside]).max() < 1e-6
    assert np.abs(after["_rest"][inside] - before["dog"][inside]).max() < 0.05
    assert np.abs(after["dog"][outside] - before["dog"][outside]).max() < 1e-6
    silent = rendered(assigned, sound, Edits(spans=(Span(0, 9, "dog", False), Span(0, 9, "violin", False))))
    assert (np.abs(silent["_rest"] - sound) < 1e-6).all()  # to the rest, where nothing is


def test_a_span_with_an_object_raises_its_share_there_and_only_there(assigned: Assigned, sound: np.ndarray) -> None:
    parts = rendered(assigned, sound, Edits(spans=(Span(1.0, 3.0, "cat", True),)))
    assert np.abs(parts["cat"][int(1.1 * RATE) : int(2.9 * RATE)]).max() > 0.005
    assert np.abs(parts["cat"][int(3.2 * RATE) :]).max() < 1e-6
    (window, *_), edits = assigned.windows, Edits(spans=(Span(1.0, 2.0, "cat", True),))
    before, inside = assigned.pieces(0, window, edits)
    assert not before.shares[2].any() and (before.end, inside.end) == (RATE, 2 * RATE)
    energy = window.energy(assigned.how, inside)
    least = assigned.how.least_share / 3
    assert float(inside.shares[2] @ energy / energy.sum()) == pytest.approx(least, rel=0.01)


def test_added_objects_claim_beside_those_that_stay_in_whatever_order(assigned: Assigned) -> None:
    both = [assigned.edited(Edits(add=names)).sound_scores for names in (("cat", "harp"), ("harp", "cat"))]
    assert both[0] == pytest.approx(both[1], abs=1e-6)
    (window, *_) = assigned.windows
    posteriors = dict(zip(assigned.known, basis_posteriors(window.relation[None])[0], strict=False))
    removed = assigned.pieces(0, window, Edits(add=("cat",), remove=("dog",)))[0].shares
    own = posteriors["cat"].clamp_min(1e-9)
    claim = own / (own + posteriors["violin"])  # the violin is what stays
    energy = window.energy(assigned.how, assigned.pieces(0, window, Edits())[0])
    least = torch.tensor([0.0, assigned.how.least_share / 2])
    violin, rest = (s * (1 - claim) for s in assigned.pieces(0, window, Edits(remove=("dog",)))[0].shares)
    expected = at_least(torch.stack([violin, claim, rest]), energy / energy.sum(), least)
    torch.testing.assert_close(removed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("before_s", [0.02, 0.005, 0.0005])
def test_spans_may_end_in_the_last_frames(assigned: Assigned, sound: np.ndarray, before_s: float) -> None:
    rendered(assigned, sound, Edits(spans=(Span(1.0, SECONDS - before_s, "dog", False),)))


def test_sounds_shorter_than_a_frame_are_edited(sound: np.ndarray) -> None:
    short = sound[: model().config.stft.n_fft // 4]
    assigned = Separator(model()).plan([short], ["dog", "violin"]).assigned
    parts = rendered(assigned, short, everywhere(assigned, "violin"))
    assert np.abs(parts["violin"] - short).max() < 1e-4


def test_edits_that_cannot_be_are_refused_before_anything_is_made(sound: np.ndarray) -> None:
    asked = []

    def factorized(waveforms: Sequence[np.ndarray], seeds: Sequence[int], how: ExtractionConfig) -> Future:
        asked.extend(seeds)
        done: Future = Future()
        done.set_result([factorize(torch.from_numpy(x), s, how) for x, s in zip(waveforms, seeds, strict=True)])
        return done

    assigned = Separator(model(), factorize=factorized).plan([sound], ["dog", "violin"]).assigned
    before = len(asked)
    with pytest.raises(ValueError, match="window 999"):
        assigned.edited(Edits((Move(999, 0, "dog"),)))
    assert len(asked) == before > 0
    assigned.edited(Edits())
    assert len(asked) > before


@settings(max_examples=15)
@given(st.data())
def test_whatever_is_edited_adds_up_to_the_sound(assigned: Assigned, sound: np.ndarray, data: st.DataObject) -> None:
    names = st.sampled_from(["dog", "violin", "cat", "harp"])
    places = st.tuples(st.integers(0, len(assigned.windows) - 1), st.integers(0, assigned.how.n_bases - 1))
    moves = data.draw(st.dictionaries(places, st.one_of(names, st.just(REST)), max_size=6))
    added = data.draw(st.sets(names, max_size=2))
    times = sorted(data.draw(st.sets(st.floats(0, 4.9), min_size=2, max_size=4)))
    there = {"dog", "violin", *added}
    spans = [Span(a, b, data.draw(st.sampled_from(sorted(there))), data.draw(st.booleans())) for a, b in _pairs(times)]
    unused = there - {*moves.values(), *added, *(s.object for s in spans)}
    removed = data.draw(st.sets(st.sampled_from(sorted(unused)))) if unused else set()
    edits = Edits(tuple(Move(*at, to) for at, to in moves.items()), tuple(added), tuple(removed), tuple(spans))
    for number, window in enumerate(assigned.windows):
        for piece in assigned.pieces(number, window, edits):
            torch.testing.assert_close(piece.shares.sum(0), torch.ones(len(window.factors.H)), atol=1e-4, rtol=0)
            assert (piece.shares >= 0).all()
    rendered(assigned, sound, edits)
    assert Edits.from_json(edits.to_json()) == edits


def _pairs(times: list[float]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(times[::2], times[1::2], strict=False)]


def test_bases_of_other_factorisations_go_with_the_likest_of_the_first() -> None:
    W, H = torch.eye(6)[:, :3], torch.ones(3, 4)
    both = Factors(torch.cat([W, W.flip(1)], 1), torch.cat([H, H]), 0.0)
    assert followed(both, 3).tolist() == [0, 1, 2, 2, 1, 0]


def test_a_separation_by_threshold_is_not_edited(sound: np.ndarray) -> None:
    plan = Separator(model(assignment="threshold")).plan([sound], ["dog"])
    assert not plan.is_editable
    with pytest.raises(ValueError, match="can't be edited"):
        _ = plan.assigned


# --------------------------------------------------------------------------------------- the value


def test_labels_are_what_sounds_in_a_stretch() -> None:
    spans = (Span(0, 4, "dog", False), Span(3, 6, "dog", False), Span(8, 9, "cat", True))
    edits = Edits((Move(0, 1, "harp"), Move(0, 2, REST)), ("car",), ("violin",), spans)
    assert edits.labels(["dog", "violin"]) == ["car", "cat", "dog", "harp"]
    assert edits.labels(["dog", "violin"], 0, 6) == ["car", "harp"]
    assert edits.labels(["dog", "violin"], 1, 7) == ["car", "dog", "harp"]
    assert Edits().labels([]) == []


def test_typed_names_become_the_vocabularys() -> None:
    typed = Edits.from_json(
        '{"moves": [{"basis": 1, "to": "Violins"}, {"basis": 2, "to": "_rest"}], "add": ["motorbike"]}'
    )
    named = typed.named(AUDIOSET_23.find)
    assert named.moves == (Move(0, 1, "violin"), Move(0, 2, REST)) and named.add == ("motorcycle",)
    with pytest.raises(ValueError, match="unknown object 'unicorn'"):
        Edits(add=("unicorn",)).named(AUDIOSET_23.find)


MISTAKES = {
    "[": "no JSON",
    "[]": "give an object with moves, add, remove, spans, duration_s",
    '{"move": []}': "the edits have 'move'; there are moves, ",
    '{"moves": 3}': "the edits' moves are 3; give a list",
    '{"moves": [{"basis": 1}]}': r"moves\[0\] lack 'to'",
    '{"moves": [{"basis": -1, "to": "dog"}]}': r"moves\[0\].basis is -1; it is a whole number, from 0",
    '{"moves": [{"basis": true, "to": "dog"}]}': "is True; it is a whole number",
    '{"moves": [{"basis": 1, "to": ""}]}': "it is an object's name",
    '{"moves": [{"basis": 1, "to": "dog"}, {"basis": 1, "to": "cat"}]}': "move basis 1 of window 0 twice",
    '{"spans": [{"start_s": 2, "end_s": 1, "object": "dog", "present": true}]}': "2 s to 1 s; it must start at 0",
    '{"spans": [{"start_s": 0, "end_s": NaN, "object": "dog", "present": true}]}': "it is a number of seconds",
    '{"duration_s": 1' + 400 * "0" + "}": "duration_s is 1000.*; it is a number of seconds",
    '{"duration_s": "9"}': "it is a number of seconds",
    '{"duration_s": [9]}': "it is a number of seconds",
    '{"spans": [{"start_s": 0, "end_s": 1, "object": "dog", "present": 1}]}': "present is 1; it is true or false",
    '{"spans": [{"start_s": 0, "end_s": 1, "object": "dog"}]}': "lack 'present'",
    '{"add": ["dog"], "remove": ["dog"]}': "take dog away and use it, too",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line_with_a_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[text]) as error:
        Edits.from_json(text)
    assert "\n" not in str(error.value)


def test_spans_that_contradict_each_other_are_refused() -> None:
    inside = (Span(0, 9, "dog", True), Span(1, 2, "dog", True), Span(3, 4, "dog", False))
    with pytest.raises(ValueError, match="dog sounds and is silent at 3 s"):
        Edits(spans=inside)
    Edits(spans=(Span(0, 1, "dog", True), Span(1, 2, "dog", False)))


def test_edits_of_another_sound_are_refused(assigned: Assigned) -> None:
    for edits, words in {
        Edits((Move(0, 6, "dog"),)): "basis 6 of window 0; there are 6 bases",
        Edits((Move(3, 0, "dog"),)): "window 3; there are 3 windows",
        Edits(remove=("cat",)): "silence cat, which isn't in this separation; it has dog, violin",
        Edits(spans=(Span(6, 7, "dog", True),)): "starts at 6 s, and the sound ends at 5.00 s",
        Edits(duration_s=9.0): "9.00 s, and this one lasts 5.00 s",
        Edits(add=("unicorn",)): "the edits name unicorn",
    }.items():
        with pytest.raises(ValueError, match=words):
            assigned.edited(edits)
    assert assigned.edited(Edits(duration_s=5.04)).objects == ("dog", "violin")
    assert not json.loads(Edits().to_json()).get("duration_s") and math.isclose(SECONDS, 5)
