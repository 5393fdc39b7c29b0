"""Faults that were met in use, and mended: what went wrong, and what must hold since.

Add yours here when it teaches something that the code beside it doesn't.
"""

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from avsep import (
    shards,
    storage,
    tables,
    work,
)
from avsep.dictionary import BasisDictionary
from avsep.factors import DataConfig, ExtractionConfig
from avsep.nmf import factorize, infer_activations
from avsep.objects import AUDIOSET_23, object_index
from avsep.records import Rejection, Segment
from avsep.separation import Separator
from avsep.service.results import NoSuchJob, ResultStore
from avsep.service.uploads import BadUpload, public_addresses
from pipelines import (
    cluster,
    console,
    demo,
    runners,
)
from tests.support.tones import DOG, SMALL, VIOLIN, model, tone

CONFIGURATION = DataConfig(ExtractionConfig(), AUDIOSET_23).as_dict()


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Bases rounded to float16 lost a frequency that a loud clip has: V/(WH) was V/0, and the factors NaN.
def test_a_frequency_that_no_basis_has_gives_no_nan() -> None:
    """V/(WH) is V/0 there: a basis file rounded to float16 and a loud bin bring that about."""
    V, W = 300 * uniform(12, 8) + 5, uniform(12, 2, seed=1)
    W[3] = 0
    H = infer_activations(V, W)
    rows = [i for i in range(12) if i != 3]
    assert torch.allclose(H, infer_activations(V[rows], W[rows]), rtol=1e-4)
    W_found, H_found = factorize(V, 2, n_iter=20, W0=W)
    assert torch.isfinite(W_found).all() and torch.isfinite(H_found).all() and not W_found[3].any()
    assert torch.equal(W_found.amax(0), torch.ones(2))


# A basis of zeros has a sum of zero: loud input gave 0 · inf, so NaN.
def test_a_basis_of_zeros_gets_no_activations() -> None:
    W = uniform(30, 3)
    W[:, 1] = 0
    H = infer_activations(uniform(30, 20, seed=4), W, n_iter=10)
    assert not H[1].any() and (H[[0, 2]].sum(1) > 0).all()


# Bases of extreme level left float32's range within an update.
@pytest.mark.parametrize("level", [1e-38, 1e-20, 1e20, 1e35])
def test_bases_of_any_level_will_do(level: float) -> None:
    V, W = uniform(30, 20), uniform(30, 4, seed=1)
    assert torch.allclose(infer_activations(V, W * level) * level, infer_activations(V, W), rtol=1e-3, atol=1e-5)


# So did a start: 1e38 gave zeros, and a frame whose start is zero gave NaN.
def test_a_start_of_any_level_will_do_and_a_frame_without_one_is_empty() -> None:
    V, W, H0 = 1000 * uniform(30, 20), uniform(30, 4, seed=1), uniform(4, 20, seed=2)
    expected = infer_activations(V, W, H0=H0)
    for level in (1e-38, 1e38):
        assert torch.allclose(infer_activations(V, W, H0=H0 * level), expected, rtol=1e-3)
    H0[:, 3] = 0
    found = infer_activations(V, W, H0=H0)
    assert not found[:, 3].any() and torch.allclose(found[:, 4:], expected[:, 4:], rtol=1e-5)
    assert not infer_activations(V, torch.zeros_like(W)).any()


# Under inference mode the threads that share a batch could not write into it.
def test_clips_in_several_threads_may_be_inference_tensors() -> None:
    V, before = uniform(3, 40, 25), torch.get_num_threads()
    expected = factorize(V, 4, n_iter=10)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = factorize(V.clone(), 4, n_iter=10)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Learned masks without a basis had nothing to divide by.
def test_learned_masks_give_all_to_the_rest_where_no_basis_is_anyone_s() -> None:
    """Three objects that the dictionary lacks share every basis, none of which is more than half anyone's."""
    undecided = model(bases="learned")
    undecided.dictionary = BasisDictionary({"cat": torch.ones(SMALL.n_bins, 2)})
    with torch.no_grad():
        undecided.network.subconcepts.weight.zero_()
        undecided.network.subconcepts.bias.zero_()
    separator, sound = Separator(undecided), tone(DOG, 1.0)
    masks = separator.masks(sound, separator.analyse(sound), [DOG, VIOLIN, object_index("harp")])
    assert torch.equal(masks[-1], torch.ones_like(masks[-1])) and not masks[:-1].any()


# A full TMPDIR was told at the next read, by another error; a plan's file must be flushed.
def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for buffering in (0, 1 << 20):  # the error comes with a write, or with the flush
        full = Path("/dev/full").open("w+b", buffering=buffering)  # noqa: SIM115  (closing fails, too)
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda full=full: full)
        with pytest.raises(OSError, match=r"No space left on device; make room there, or let TMPDIR name") as caught:
            Separator(model())(tone(DOG, 1.0), ["dog"])
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == tempfile.gettempdir()
        with contextlib.suppress(OSError):
            full.close()


# A store that was away for an upload's first part and back for its last must not keep it without its beginning.
def test_an_upload_that_loses_its_beginning_is_not_stored_without_it(store, store_folder, impatient) -> None:
    """The store is away for the first part and back for the last."""
    path, puts = storage.join(store_folder, "a.bin"), itertools.count()
    storage.write_bytes(path, b"old")
    store.fault = lambda method, _: "slow_down" if method == "PUT" and next(puts) < 3 else None
    with contextlib.suppress(OSError):
        storage.write_bytes(path, b"x" * (25 << 20))
    store.calm()
    assert storage.read_bytes(path) in (b"old", b"x" * (25 << 20))


# What a killed separation left stayed for ever; a living writer's must stay.
def test_a_folder_that_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = socket.gethostname()
    for pid in (ended.stdout.strip(), os.getpid()):
        folder = tmp_path / f".separation.{host}.{pid}.0123abcd.tmp"
        folder.mkdir()
        (folder / "dog.wav").touch()
    assert len(storage.sweep(str(tmp_path))) == 1
    assert [p.name for p in tmp_path.iterdir()] == [f".separation.{host}.{os.getpid()}.0123abcd.tmp"]


# Credentials in a URI are refused, and the colon before a port was taken for one.
def test_a_port_is_no_credential() -> None:
    for uri in (
        "hdfs://namenode:8020/a",
        "hdfs://[2001:db8::1]:8020/a",
        "http://[::1]/a.mp4",
        "http://[::1]:9000/a.mp4",
    ):
        assert storage.resolve(uri, ".") == uri


# Files whose names aren't UTF-8 could not be read.
def test_a_file_whose_name_is_no_utf_8_is_listed_and_read(tmp_path: Path) -> None:
    file = tmp_path / "\udcff.wav"
    file.write_bytes(b"sound")
    assert storage.list_files(str(tmp_path)) == [str(file)]
    with storage.local_file(str(file)) as path:
        assert str(path).isascii() and path.suffix == ".wav" and path.read_bytes() == b"sound"
    assert file.read_bytes() == b"sound"
    assert storage.list_files(str(tmp_path / "nosuch")) == []


# Cells may hold line breaks, so a quote that nobody closed would take all lines after it into its cell.
def test_a_quote_that_is_never_closed_costs_its_own_line_alone(tmp_path: Path) -> None:
    """Whatever follows: rows with quotes, rows of two lines, other broken ones."""
    text = (
        "segment_id,source,notes\n"
        'a,"a.mp4,\n'
        'b,"b.mp4","two\nlines"\n'
        'c,"c.mp4,x\n'
        "d,d.mp4,x\n"
        'e,e.mp4,"x"\n'
        'f,"f".mp4,x\n'
        'g,g.mp4,"x\n' + "h,h.mp4,\n" * 60
    )
    (tmp_path / "t.csv").write_text(text)
    layout = tables.read_layout(str(tmp_path / "t.csv"), ["segment_id", "source"], [])
    rows = list(tables.read_rows(layout))
    assert [(r.line, r.cells.get("segment_id")) for r in rows if not r.problem and r.cells["segment_id"] != "h"] == [
        (3, "b"),
        (6, "d"),
        (7, "e"),
    ]
    bad = [(r.line, r.text) for r in rows if r.problem]
    assert bad == [(2, 'a,"a.mp4,'), (5, 'c,"c.mp4,x'), (8, 'f,"f".mp4,x'), (9, 'g,g.mp4,"x')]
    assert sum(r.cells.get("segment_id") == "h" for r in rows) == 60


# A table that grew has other shards: a retry there left the first rejection standing beside its own.
def test_a_retry_in_another_shard_supersedes(tmp_path):
    """The table grew, so that shards are others."""
    out = str(tmp_path)

    def reject(ids, reason, retry=None):
        segments = [Segment(i, f"{i}.wav", 0.0, 1.0, "train", labels=("dog",)) for i in ids]
        for w in work.plan_work(shards.read_state(out), segments, retry):
            new = [
                Rejection(s.segment_id, "decode", reason, True, w.attempts.get(s.segment_id, 0) + 1) for s in w.segments
            ]
            options = {
                "configuration": CONFIGURATION,
                "shape": (9, 2),
                "retried": sorted(w.attempts),
            }
            shards.write_shard(out, w.shard, w.generation, [], [*w.kept, *new], **options)

    few = [f"s{i}" for i in range(40)]
    reject(few, "timed_out")
    for attempts in (2, 3, 4):
        reject([*few, *(f"n{i}" for i in range(10))], "unreadable", [])
        assert {(r.reason, r.attempts) for r in shards.read_rejections(out) if r.segment_id in few} == {
            ("unreadable", attempts)
        }


# AVSEP_CPUS=0 was taken, and tasks waited for ever.
def test_no_workers_are_refused(monkeypatch):
    """With none, tasks would wait for ever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("AVSEP_CPUS", "0")
    rule = "AVSEP_CPUS=0: it must be a whole number from 1 up"
    with pytest.raises(console.UsageError, match=rule), runners.session():
        pass


# Where Ray failed to start, its processes went on beside the next try's.
def test_what_a_failed_start_left_is_ended():
    before = cluster.children()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        assert cluster.children() - before == {process.pid}
        cluster.end({process.pid})
        assert not Path(f"/proc/{process.pid}").exists()


# SIGTERM while Ray started ended in its handler, with a trace of addresses.
def test_rays_own_answer_to_sigterm_is_an_interruption(monkeypatch):
    import ray

    def init(**_: object) -> None:
        raise SystemExit(15)  # what its handler does while it starts

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        cluster.init_ray("local")


# The demo cleared its output folder, whoever had made it.
def test_the_demo_leaves_folders_alone_that_it_did_not_make(tmp_path, capfd):
    mine = tmp_path / "clips" / "references" / "mine" / "dog.flac"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "holds clips/, which no demo made; give another folder" in capfd.readouterr().err
    assert mine.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["clips"]
    assert demo.main(["--out", str(tmp_path / "new"), "--clips", "7"]) == 2
    for n_clips in (8, 20, 40, 120):
        counts = demo.split_clips(n_clips)
        assert sum(counts.values()) == n_clips and all(counts.values())
    assert counts == {"train": 90, "val": 12, "test": 18}


# An IPv6 address that holds a private IPv4 one passed for public, so a URL could reach the service's own network.
@pytest.mark.parametrize("address", ["64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a00:1", "::ffff:10.0.0.1"])
def test_private_addresses_within_others_are_found(address):
    with pytest.raises(BadUpload, match="not a public address"):
        public_addresses(address, 80)
    assert public_addresses("64:ff9b::808:808", 80)


# Half a job.json, as a machine that stops leaves it, ended the service.
@pytest.mark.parametrize("state", [None, "", '{"id": "0', '{"id": "\udcff'])
def test_the_store_removes_folders_that_are_no_job(tmp_path, state):
    """A machine that stopped in the middle of things left them."""
    store = ResultStore(tmp_path, ttl_s=1000, stale_s=1000)
    job, broken = store.create(), store.create()
    if state is None:
        (tmp_path / broken / "job.json").unlink()
    else:
        (tmp_path / broken / "job.json").write_text(state, errors="surrogateescape")
    for function in (store.job, store.update):
        with pytest.raises(NoSuchJob):
            function(broken)
    store.sweep()
    assert store.unfinished() == [] and store.usage()["uploading"] == 1
    assert sorted(os.listdir(tmp_path)) == sorted([job, broken])  # it may be in the making
    os.utime(tmp_path / broken, (0, 0))
    store.sweep()
    assert os.listdir(tmp_path) == [job]
