import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from avsep import shards, storage
from avsep.objects import AUDIOSET_23
from avsep.records import ClipRecord, Rejection, Segment, definition
from avsep.shards import DataFile, plan, read_ids, write_shard

F, M = 6, 2
CONFIGURATION = {"n_bases": M, "labeller": None, "vocabulary": AUDIOSET_23.as_list()}


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A local folder, and an object store's stand-in: fsspec's memory, where a write is one PUT."""
    if request.param == "local":
        yield str(tmp_path / "clips")
        return
    yield request.getfixturevalue("memory_folder")


def clip(segment_id: str, split: str = "train", level: float = 1.0) -> ClipRecord:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(segment_id.encode()).digest()[:4], "big"))
    bases = rng.random((F, M)).astype(np.float16)
    activations = rng.random((M, 3 + len(segment_id))).astype(np.float16)
    return ClipRecord(
        segment_id, f"/v/{segment_id}.mp4", 0.0, None, split, None, ("dog",), bases / bases.max(0),
        activations, level, np.full(M, 1 / M, np.float32), None, 1.5, 10.0, -20.0, "0" * 64, "given",
    )  # fmt: skip


def rejection(segment_id: str, attempts: int = 1, reason: str = "timed_out") -> Rejection:
    return Rejection(segment_id, "decode", reason, True, attempts, "")


def write(out: str, shard: str, generation: int, clips: str, rejections: str, **options: object) -> shards.Commit:
    """Write clips and rejections, given as words of one-letter ids."""
    return write_shard(
        out, shard, generation, [clip(i) for i in clips], [rejection(i, generation + 1) for i in rejections],
        configuration=CONFIGURATION, shape=(F, M), **options,
    )  # fmt: skip


def data_files(out: str) -> list[str]:
    return [f for kind in ("clips", "rejections") for f in storage.list_files(storage.join(out, kind))]


# ------------------------------------------------------------------------------------ the plan


def segments(n: int) -> list[Segment]:
    return [Segment(f"s{i}", f"/v/{i}.mp4") for i in range(n)]


def test_the_plan_follows_from_the_segments_alone() -> None:
    """Each segment is in one shard; the order of the manifest means nothing."""
    made = plan(segments(100), 7)
    shuffled = segments(100)
    random.Random(0).shuffle(shuffled)
    assert plan(shuffled, 7) == made
    assert sorted(s.segment_id for shard in made for s in shard.segments) == sorted(f"s{i}" for i in range(100))
    assert [len(shard.segments) for shard in made] == [7] * 14 + [2]
    assert len({shard.name for shard in made}) == 15
    assert plan([]) == []


def test_a_changed_manifest_cannot_reuse_a_name() -> None:
    before = {shard.name: shard for shard in plan(segments(100), 7)}
    after = {shard.name: shard for shard in plan(segments(101), 7)}
    assert all(before[name] == after[name] for name in before.keys() & after.keys())
    assert before.keys() != after.keys()


def test_a_shard_is_a_random_sample() -> None:
    numbers = [int(s.segment_id[1:]) for s in plan(segments(1000), 100)[0].segments]
    assert 400 < np.mean(numbers) < 600 and max(numbers) - min(numbers) > 900


def test_shards_grow_with_the_manifest() -> None:
    sizes = [shards.default_shard_size(n) for n in (1, 400, 2000, 190_000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert len(plan(segments(20))) > 1  # a small set spreads over workers


# ---------------------------------------------------------------------------- writing, reading


def test_what_is_committed_is_read_back_once(out: str) -> None:
    commit = write(out, "00000-aa", 0, "ac", "b", timings_s={"decode": 1.5})
    assert (commit.clip_ids, commit.rejection_ids) == (("a", "c"), ("b",))
    write(out, "00001-bb", 0, "d", "")
    write(out, "00002-cc", 0, "", "e")
    assert read_ids(out) == (["a", "c", "d"], ["b", "e"])
    assert read_ids(out) == read_ids(out if ":" in out else Path(out))
    assert [r.segment_id for r in shards.read_clips(out)] == ["a", "c", "d"]
    assert shards.read_rejections(out) == [rejection("b"), rejection("e")]
    assert shards.read_commits(out)[0] == commit
    for got in shards.read_clips(out):
        expected = clip(got.segment_id)
        for field in dataclasses.fields(ClipRecord):
            assert np.array_equal(getattr(got, field.name), getattr(expected, field.name)), field.name
        assert got.bases.dtype == np.float16 and got.bases.shape == (F, M) and got.image_logits is None


def test_splits_are_read_apart(out: str) -> None:
    write_shard(out, "x", 0, [clip("a"), clip("b", "val")], [], configuration=CONFIGURATION, shape=(F, M))
    assert [r.segment_id for r in shards.read_clips(out, split="val")] == ["b"]


def test_files_carry_schema_version_configuration_and_digest(out: str) -> None:
    commit = write(out, "x", 0, "a", "b")
    assert commit.clips and commit.rejections
    for data in (commit.clips, commit.rejections):
        raw = storage.read_bytes(storage.join(out, data.path))
        assert hashlib.sha256(raw).hexdigest() == data.sha256
        with storage.open_input(storage.join(out, data.path)) as f:
            metadata = pq.read_schema(f).metadata
        assert metadata[b"avsep.schema_version"] == b"3"
        assert json.loads(metadata[b"avsep.configuration"]) == CONFIGURATION
        assert metadata[b"avsep.digest"].decode() == commit.digest == shards.configuration_digest(CONFIGURATION)
    assert shards.read_configuration(out) == CONFIGURATION
    assert shards.configuration_digest(dict(reversed(CONFIGURATION.items()))) == commit.digest  # order of keys
    assert shards.configuration_digest(CONFIGURATION | {"n_bases": M + 1}) != commit.digest


def test_row_groups_are_sized_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shards.clips_to_table([clip("a")], F, M).nbytes
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 3 * one)
    commit = write(str(tmp_path), "x", 0, "abcdefghij", "")
    assert commit.clips
    metadata = pq.read_metadata(tmp_path / commit.clips.path)
    assert metadata.num_rows == 10 and 3 <= metadata.num_row_groups <= 4


def test_columns_can_be_read_alone(tmp_path: Path) -> None:
    write(str(tmp_path), "x", 0, "ab", "")
    table = shards.read_table(shards.clip_files(str(tmp_path))[0], ["segment_id", "labels"])
    assert table.to_pydict() == {"segment_id": ["a", "b"], "labels": [["dog"], ["dog"]]}


# -------------------------------------------------------------------------------- exactly once


def test_a_retry_supersedes_the_shards_rejections(out: str) -> None:
    write(out, "x", 0, "a", "bcd")
    write(out, "y", 0, "", "e")
    write(out, "x", 1, "b", "cd")
    assert read_ids(out) == (["a", "b"], ["c", "d", "e"])
    assert [r.attempts for r in shards.read_rejections(out)] == [2, 2, 1]
    write(out, "x", 2, "cd", "")
    assert read_ids(out) == (["a", "b", "c", "d"], ["e"])
    assert shards.read_rejections(out) == [rejection("e")]
    assert [c.generation for c in shards.read_commits(out)] == [0, 1, 2, 0]


def test_only_the_last_generations_rejections_stand(out: str) -> None:
    write(out, "x", 0, "a", "bc")
    write(out, "x", 1, "", "c")
    assert read_ids(out) == (["a"], ["c"]) and [r.attempts for r in shards.read_rejections(out)] == [2]


def test_a_clip_made_in_another_shard_is_no_rejection_any_more(out: str) -> None:
    """The manifest grew: what shard x rejected was retried as part of shard y."""
    write(out, "x", 0, "a", "bc")
    write(out, "y", 0, "bz", "")
    assert read_ids(out) == (["a", "b", "z"], ["c"])
    assert [r.segment_id for r in shards.read_rejections(out)] == ["c"]


def test_a_generation_that_replaces_its_shard_makes_the_earlier_ones_count_for_nothing(out: str) -> None:
    """For readers from its commit on; for the disk from the next sweep on, even if the first was killed."""
    write(out, "x", 0, "ab", "cd")
    write(out, "x", 1, "c", "d", retried=["c"])
    write(out, "y", 0, "e", "")
    whole = write(out, "x", 2, "ac", "bd", replaces=True)
    for _ in range(2):
        assert read_ids(out) == (["a", "c", "e"], ["b", "d"])
        assert [r.segment_id for r in shards.read_clips(out)] == ["a", "c", "e"]
        assert [(r.segment_id, r.attempts) for r in shards.read_rejections(out)] == [("b", 3), ("d", 3)]
        assert [(c.shard, c.generation) for c in shards.read_commits(out)] == [("x", 2), ("y", 0)]
        storage.delete_file(storage.join(out, "commits", "x-g1.json"))  # as a killed sweep may leave it
        shards.sweep(out, shards.read_commits(out))
    assert sorted(map(storage.name, storage.list_files(storage.join(out, "commits")))) == ["x-g2.json", "y-g0.json"]
    assert len(data_files(out)) == 3
    write(out, "x", 1, "c", "d")  # by a worker that was thought lost
    assert read_ids(out) == (["a", "c", "e"], ["b", "d"])
    write(out, "x", 3, "b", "d")
    assert read_ids(out) == (["a", "b", "c", "e"], ["d"])
    assert whole in shards.read_commits(out)


def test_a_commit_says_what_was_asked_for(out: str) -> None:
    asked = [Segment(i, f"/v/{i}.mp4", labels=("dog",)) for i in "abc"]
    write(out, "x", 0, "ab", "c", asked={"c": definition(asked[2])})
    now = [asked[0], dataclasses.replace(asked[1], end_s=4.0), dataclasses.replace(asked[2], labels=None)]
    state = shards.read_state(out)
    assert shards.changed_clips(out, state.commits, asked) == {} and not state.changed_rejections(asked)
    assert shards.changed_clips(out, state.commits, now) == {"b": asked[1]}
    assert state.changed_rejections(now) == {"c"}
    if ":" not in out:  # a commit record of before says nothing: the clips do
        path = Path(out, "commits", "x-g0.json")
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "asked"}))
        assert shards.changed_clips(out, shards.read_commits(out), now) == {"b": asked[1]}


def test_a_tenth_generation_comes_after_the_ninth(out: str) -> None:
    for generation in range(11):
        write(out, "x", generation, "", "ab")
    assert [r.attempts for r in shards.read_rejections(out)] == [11, 11]
    assert len(data_files(out)) == 11  # a later generation deletes no earlier one's files


def test_of_twins_one_commit_stands(out: str) -> None:
    """A task thought lost ran twice: the second finds the first's commit and takes its own files away."""
    first = write(out, "x", 0, "a", "b")
    slower = write_shard(out, "x", 0, [clip("a", level=2.0), clip("b")], [], configuration=CONFIGURATION, shape=(F, M))
    assert slower == first
    assert read_ids(out) == (["a"], ["b"])
    named = {storage.join(out, f.path) for f in (first.clips, first.rejections) if f}
    assert set(data_files(out)) == named
    assert write(out, "x", 0, "a", "b") == first and set(data_files(out)) == named  # an equal twin, too


def test_twins_at_the_same_time(tmp_path: Path) -> None:
    out, results = str(tmp_path), []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        made = [clip(i, level=1.0 + number) for i in "abc"]
        results.append(write_shard(out, "x", 0, made, [], configuration=CONFIGURATION, shape=(F, M)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4 and all(r == results[0] for r in results)
    assert [r.segment_id for r in shards.read_clips(out)] == ["a", "b", "c"]
    assert len(data_files(out)) == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.data_store import test_shards

def die_at_the_commit(event, arguments):
    if event == "open" and "/commits/" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_at_the_commit)
test_shards.write({out!r}, "x", 0, "ab", "c")
"""


def test_an_orphan_of_a_killed_writer_counts_for_nothing(tmp_path: Path) -> None:
    """Killed between its data and its commit: nothing is committed, and the next run commits once."""
    out = str(tmp_path)
    code = KILLED.format(out=out, root=str(Path(__file__).parents[2]))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(data_files(out)) == 2
    assert read_ids(out) == ([], []) and shards.read_commits(out) == [] and shards.read_rejections(out) == []
    (tmp_path / "commits" / "x-g0.json.77.abcd.tmp").write_text("{")  # and one killed in mid-commit
    assert read_ids(out) == ([], [])
    write(out, "x", 0, "a", "bc")
    assert read_ids(out) == (["a"], ["b", "c"])
    assert [r.segment_id for r in shards.read_clips(out)] == ["a"] and len(shards.clip_files(out)) == 1
    assert [r.segment_id for r in shards.read_rejections(out)] == ["b", "c"]


def test_a_failed_write_commits_nothing(tmp_path: Path) -> None:
    out = str(tmp_path)
    (tmp_path / "clips").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        write(out, "x", 0, "a", "b")
    assert not (tmp_path / "commits").exists() and read_ids(out) == ([], [])


# -------------------------------------------------------------------------------------- errors


def test_a_segment_twice_or_broken_is_refused_before_anything_is_written(out: str) -> None:
    with pytest.raises(ValueError, match="shard x: a segment is there twice among 3"):
        write(out, "x", 0, "ab", "a")
    with pytest.raises(ValueError, match="'bad luck' is none of"):
        write_shard(out, "x", 0, [], [rejection("a", reason="bad luck")], configuration=CONFIGURATION, shape=(F, M))
    assert data_files(out) == [] and read_ids(out) == ([], [])


def damaged(commit: bytes) -> dict[str, bytes]:
    whole = json.loads(commit)
    return {
        "cut short": commit[: len(commit) // 2],
        "empty": b"",
        "zeros": b"\0" * 40,
        "not UTF-8": b"\xff\xfe{",
        "a list": b"[1, 2]",
        "a key missing": json.dumps({k: v for k, v in whole.items() if k != "clips"}).encode(),
        "a key too many": json.dumps(whole | {"colour": "red"}).encode(),
        "a file without a hash": json.dumps(whole | {"clips": {"path": "x"}}).encode(),
    }


@pytest.mark.parametrize("how", damaged(b'{"clips": 1}'))
def test_a_corrupted_commit_is_named_with_the_remedy(tmp_path: Path, how: str) -> None:
    out, path = str(tmp_path), tmp_path / "commits" / "x-g0.json"
    write(out, "x", 0, "a", "b")
    path.write_bytes(damaged(path.read_bytes())[how])
    for read in (read_ids, shards.read_commits, shards.read_rejections, shards.clip_files):
        with pytest.raises(ValueError, match=r"x-g0.json is no commit record .*remove it to have its shard done"):
            read(out)
    path.unlink()
    assert write(out, "x", 0, "a", "b").clip_ids == ("a",)


def test_nothing_committed_is_said_with_the_remedy(out: str) -> None:
    assert read_ids(out) == ([], [])
    with pytest.raises(ValueError, match=r"holds no committed clips; run pipelines.extract to it first"):
        shards.clip_files(out)
    write(out, "x", 0, "", "a")
    with pytest.raises(ValueError, match="holds no committed clips"):
        list(shards.read_clips(out))


def test_a_commit_reads_without_avsep(out: str) -> None:
    """The record is plain JSON: ids, counts by their length, SHA-256, digest, timings."""
    write(out, "x", 0, "ab", "", timings_s={"decode": 0.5})
    (path,) = storage.list_files(storage.join(out, "commits"))
    raw = json.loads(storage.read_bytes(path))
    assert raw["clips"]["ids"] == ["a", "b"] and len(raw["clips"]["sha256"]) == 64 and raw["rejections"] is None
    assert (raw["shard"], raw["generation"], raw["timings_s"]) == ("x", 0, {"decode": 0.5})
    assert raw["schema_version"] == 3 and len(raw["digest"]) == 16
    assert isinstance(shards.read_commits(out)[0].clips, DataFile)


def test_shards_of_another_version_are_refused_in_one_line(out: str) -> None:
    write(out, "x", 0, "ab", "")
    (path,) = storage.list_files(storage.join(out, "commits"))
    raw = json.loads(storage.read_bytes(path))
    storage.delete_file(path)
    storage.write_text(path, json.dumps(raw | {"schema_version": 1}))
    expected = (
        rf"the shards in {out} are of schema version 1, this program's are of 3: extract the clips again, to another"
    )
    for read in (shards.read_ids, shards.read_state, shards.clip_files, shards.read_configuration):
        with pytest.raises(ValueError, match=expected):
            read(out)
