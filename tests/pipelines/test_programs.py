"""What all programs have in common: mistakes told early, interruptions, what they refuse to write over, Ray's start."""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

import pipelines
from avsep import evaluation, plots, results, results_report, storage
from avsep.objects import AUDIOSET_23
from avsep.records import Segment
from avsep.report import Report
from avsep.service import config, place
from avsep.stft import STFT
from pipelines import cluster, collect, console, demo, evaluate, runners, train
from tests.support.serving import PITCH, free_port, wait, write_model, write_sound

ROOT = Path(__file__).parents[2]


# --------------------------------------------------------------------------------- mistakes, early


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train --clips nowhere --out x",
            "--clips nowhere doesn't exist; give the folder that pipelines.extract wrote",
        ),
        ("collect --model nowhere --clips x", "--model nowhere doesn't exist; give the model folder"),
        ("serve --model .", "--model . holds no config.json; give the model folder that pipelines.train wrote"),
        ("audit --clips . --out x", "--clips . holds no commits; give the folder that pipelines.extract wrote"),
        ("manifest --table '' --out x", "--table: its value is empty: give one"),
        ("demo --out header.csv", "--out header.csv is a file; give a folder"),
        ("manifest --table row.csv --out header.csv/x", "--out header.csv/x lies in"),
        (
            "manifest --table row.csv --out http://127.0.0.1/x",
            "--out http://127.0.0.1/x is a web address, which can't be",
        ),
        ("extract --segments row.csv --out x --media s3:/b/m", "--media s3:/b/m has one slash; write s3://b/m"),
        ("extract --segments header.csv --out x", "header.csv has a column 'segment'; did you mean 'segment_id'?"),
        ("extract --segments row.csv --out x", "row.csv, row 2: start_s is 'late'"),
        ("evaluate --model . --segments row.csv --references . --out x", "--model . holds no config.json"),
        ("finetune --segments row.csv --out x --weights none.pth", "--weights none.pth doesn't exist; give a .pth"),
    ],
)
def test_what_is_not_there_or_no_table_is_told_before_what_takes_seconds_to_import(tmp_path, command, words):
    (tmp_path / "header.csv").write_text("segment,source\na,a.mp4\n")
    (tmp_path / "row.csv").write_text("segment_id,source,start_s\na,a.mp4,late\n")
    program = [sys.executable, "-X", "importtime", "-m", f"pipelines.{shlex.split(command)[0]}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*program, *shlex.split(command)[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    imports, lines = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else lines).append(line)
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], lines
    assert not {"torch", "apache_beam", "ray"} & {line.rpartition("|")[2].strip() for line in imports}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["header.csv", "row.csv"]


def test_what_files_tell_is_told_before_the_models_are_loaded(tmp_path, capfd):
    """Of a model whose weights are damaged its configuration is enough for that."""
    model = write_model(tmp_path / "model")
    Path(model, "miml.safetensors").write_bytes(b"cut")
    (tmp_path / "clips.csv").write_text("segment_id,source,split\na,a.mp4,val\n")
    command = ["--model", model, "--segments", str(tmp_path / "clips.csv"), "--references", str(tmp_path)]
    assert evaluate.main([*command, "--out", str(tmp_path / "out"), "--in-process"]) == 2
    assert "holds no segments of --split test; its splits: val" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_demo_writes_to_this_machine(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--out", "s3://bucket/demo"]) == 2
    assert "--out s3://bucket/demo: the demo writes to this machine" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inputs_are_checked_where_a_program_is_called_too_and_uris_are_left_to_it(capfd):
    assert collect.main(["--model", "nowhere", "--clips", "s3://bucket/clips"]) == 2
    assert "pipelines.collect: --model nowhere doesn't exist" in capfd.readouterr().err
    given = argparse.Namespace(clips="s3://bucket/clips", out="memory://x", cookies=[], media=None, weights=None)
    assert pipelines.missing_input(given) == ""
    assert pipelines.missing_input(argparse.Namespace(clips=40, out="new")) == ""  # the demo's number of clips
    assert "--cookies /no.txt doesn't exist" in pipelines.missing_input(argparse.Namespace(cookies=["/no.txt"]))


# ----------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_it_imports_is_one_line(tmp_path, number):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "commits").mkdir()
    command = [sys.executable, "-m", "pipelines.train", "--clips", str(tmp_path / "clips"), "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait(lambda: "numpy" in Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == "pipelines.train: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_at_work_is_one_line_that_says_how_to_go_on(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def work() -> int:
        os.kill(os.getpid(), number)
        time.sleep(10)
        return 0

    assert console.guarded(work, "pipelines.x", "--resume goes on") == 130
    assert capfd.readouterr().err == "pipelines.x: interrupted; --resume goes on\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_workers_that_die_are_one_line(capfd):
    def work() -> int:
        raise console.WorkerDied("killed by the system's lack of memory.")

    assert console.guarded(work, "pipelines.x") == 2
    assert capfd.readouterr().err.endswith("lack of memory. Run fewer at once, such as AVSEP_CPUS=1\n")


def test_a_step_of_the_demo_that_ends_early_ends_the_demo(capfd):
    for status, error in ((130, KeyboardInterrupt), (2, console.UsageError)):
        with pytest.raises(error):
            demo.step("x", lambda _, status=status: status)
    demo.step("x", lambda _: 1)


# --------------------------------------------------------------------------- what took long to make


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_is_replaced_is_kept_and_of_two_the_later(tmp_path, memory_folder, where):
    out = str(tmp_path / "out") if where == "local" else memory_folder
    files = ["model/config.json", "model/more", "history.json"]

    def write(text: str, *names: str) -> None:
        for name in names:
            storage.write_text(storage.join(out, name), text)

    def kept() -> dict[str, bytes]:
        folder = storage.join(out, "previous")
        return {f: storage.read_bytes(p) for f in files if storage.exists(p := storage.join(folder, f))}

    console.check_free(out, files, "it holds x", replace=False)
    write("first", *files)
    with pytest.raises(console.UsageError, match=r"it holds x; --replace makes it anew and keeps the last one in .*"):
        console.check_free(out, files, "it holds x", replace=False)
    console.check_free(out, files, "it holds x", replace=True)
    console.put_aside(out, files)
    assert not any(storage.exists(storage.join(out, f)) for f in files)
    assert kept() == dict.fromkeys(files, b"first")
    write("unfinished", "history.json")  # without the first of the files: what was kept is better
    console.put_aside(out, files)
    assert not storage.exists(storage.join(out, "history.json")) and kept() == dict.fromkeys(files, b"first")
    write("second", "model/config.json", "history.json")
    console.put_aside(out, files)
    assert kept() == {"model/config.json": b"second", "history.json": b"second"}


def test_a_training_is_not_written_over_unless_it_is_said(tmp_path):
    train.check_free(str(tmp_path), replace=False)
    (tmp_path / "history.json").write_text(json.dumps([{}] * 7))
    (tmp_path / "checkpoint.pt").touch()  # unfinished, too
    with pytest.raises(console.UsageError, match="holds a training of 7 epochs; --resume goes on with it"):
        train.check_free(str(tmp_path), replace=False)
    train.check_free(str(tmp_path), replace=True)


def test_results_of_something_else_are_not_written_over_unless_it_is_said(tmp_path):
    one = write_model(tmp_path / "one")
    other = write_model(tmp_path / "other", n_iter=61)
    fixed = ["--segments", "s.csv", "--references", "r", "--out", str(tmp_path / "out")]

    def provenance(*arguments: str) -> dict[str, str]:
        parsed = evaluate.parser().parse_args([*fixed, *arguments])
        return evaluate.provenance(parsed, evaluate.named_models(parsed), [])

    first = provenance("--model", one)
    storage.write_text(f"{tmp_path}/out/results.json", json.dumps({"source": first}))
    evaluate.check_free(f"{tmp_path}/out", first, replace=False)  # the same again
    for arguments, word in (
        (["--model", other], "model"),
        (["--model", one, "--paper-model", other], "paper model"),
        (["--model", one, "--given", "none"], "given"),
        (["--model", one, "--compare", f"mine={other}"], "compare mine"),
    ):
        source = provenance(*arguments)
        with pytest.raises(console.UsageError, match=f"holds results of another {word}; .*--replace"):
            evaluate.check_free(f"{tmp_path}/out", source, replace=False)
        evaluate.check_free(f"{tmp_path}/out", source, replace=True)
    storage.write_text(f"{tmp_path}/out/results.json", "[]")
    with pytest.raises(console.UsageError):
        evaluate.check_free(f"{tmp_path}/out", first, replace=False)


def test_the_demo_leaves_files_alone_that_it_did_not_make_and_replaces_its_own(tmp_path, capfd):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(console.UsageError, match=r"holds report\.html, which no demo made"):
        demo.clear(tmp_path)
    (tmp_path / "report.html").rename(tmp_path / "mine.html")
    demo.clear(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoint.pt").touch()
    demo.clear(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.html", ".avsep-demo"}
    assert "replacing the earlier demo" in capfd.readouterr().out


# -------------------------------------------------------------------------------------- Ray's start


def test_rays_workers_have_one_thread_and_the_program_its_own_variables(monkeypatch):
    """What Ray starts inherits the variables: as a job's, they would have each worker started twice."""
    import ray

    given: dict[str, object] = {}
    monkeypatch.setattr(ray, "init", lambda **settings: given.update(settings, environment=dict(os.environ)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cluster.start_ray({"num_cpus": 2})
    assert {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}.items() <= given["environment"].items()
    assert "runtime_env" not in given and given["num_cpus"] == 2
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_rays_files_go_where_its_sockets_can_be(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert cluster.ray_folder() == "/tmp/ray" and capfd.readouterr().out == ""
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert cluster.ray_folder() == "/tmp/ray" and capfd.readouterr().out == ""
    for folder, why in (("/tmp/" + 75 * "x", "characters too long for Ray's sockets"), ("/proc/none", "written to")):
        monkeypatch.setenv("TMPDIR", folder)
        assert cluster.ray_folder() == "/tmp/ray"
        said = capfd.readouterr().out
        assert said.startswith(f"note: TMPDIR={folder} ") and why in said and said.endswith("go to /tmp/ray\n")
    assert not Path("/tmp/" + 75 * "x").exists()


RAYLET = """\
[2026-11-28 09:05:36,562 I 31460 31460] (raylet) node_manager.cc:293: Initializing NodeManager
[2026-11-28 09:05:51,718 C 31460 31460] (raylet) node_manager.cc:3576:  An unexpected system state has occurred. You \
have likely discovered a bug in Ray. Please report this issue at https://github.com/ray-project/ray/issues and we'll \
work with you to fix it. Check failed: status.has_value() Timed out waiting for file /tmp/ray/metrics_agent_port_84
*** StackTrace Information ***
/venv/raylet(+0xff770a) [0x55b2c26a570a] ray::operator<<()
/venv/raylet(+0x2eee5a) [0x55b2c199ce5a] ray::raylet::NodeManager::WaitForDashboardAgentPorts()
"""


def test_a_raylets_last_words_are_quoted(tmp_path):
    log = tmp_path / "raylet.out"
    log.write_text(RAYLET)
    assert cluster.last_words(str(log)) == (
        ": Check failed: status.has_value() Timed out waiting for file /tmp/ray/metrics_agent_port_84"
        " in NodeManager::WaitForDashboardAgentPorts"
    )
    log.write_text(RAYLET.splitlines()[0])
    assert cluster.last_words(str(log)) == ""


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nonsense", "http://head:8265"])
def test_a_cluster_that_does_not_answer_is_one_line_with_a_remedy(address, monkeypatch):
    monkeypatch.setattr(cluster, "HEAD_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", address := address.format(port=free_port()))
    remedy = "; give HEAD:6379 of a cluster, or unset it to run on this machine"
    with pytest.raises(console.UsageError, match=f"RAY_ADDRESS={address}: .*{remedy}"), runners.session():
        pass


# -------------------------------------------------------------------------------------- the service


def test_the_service_without_ray(tmp_path):
    """One process, that ends at once, empties its folder, and has the status of one that was told to end."""
    model, port = write_model(tmp_path / "model"), free_port()
    sound = write_sound(tmp_path / "sound.wav")
    command = [sys.executable, "-m", "pipelines.serve", "--model", model, "--port", str(port), "--in-process"]
    environment = os.environ | {"AVSEP_SERVE_RESULTS": str(tmp_path / "results")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout and process.stdout.readline() == f"loading {model}\n"
            assert process.stdout.readline() == f"http://127.0.0.1:{port}/ is ready; Ctrl-C ends it\n"
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "torch" in maps and "ray/_raylet" not in maps
            with sound.open("rb") as file:
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/separations", files={"file": file}, timeout=100)
            assert answer.status_code == 201
            assert {o["name"] for o in answer.json()["result"]["objects"]} == set(PITCH)
        finally:
            process.terminate()
        assert process.communicate(timeout=60)[0] == "stopping\n"
    assert process.returncode == 0


def test_the_service_says_what_it_loads_before_what_takes_seconds():
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.serve", "--in-process", "--port", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, cwd=ROOT)
    lines = done.stdout.splitlines()
    heavy = [k for k, line in enumerate(lines) if line.rpartition("|")[2].strip() in ("torch", "numpy", "pyarrow")]
    assert done.returncode == 2 and heavy and lines.index("loading the starter model") < min(heavy)


def test_where_nobody_can_listen_is_told_with_the_remedy():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port, words in (
            ("127.0.0.1", 0, "--port 0: it must lie in"),
            ("127.0.0.1", 1 << 16, "--port 65536: it must lie in"),
            ("127.0.0.1", taken.getsockname()[1], "another program uses it; give a free one"),
            ("192.0.2.77", free_port(), "AVSEP_SERVE_HOST=192.0.2.77: .*; give an IPv4 address of this machine"),
        ):
            with pytest.raises(config.UnusableSettings, match=words):
                place.check_address(host, port)


# -------------------------------------------------------------------------------------- the report


def results_of(clips: int = 2, **sdr: float) -> dict:
    entries = {
        name: {
            "clips": clips,
            "mean": dict.fromkeys((*evaluation.FIGURES, *evaluation.GAINS), value),
            "interval_95": [math.nan if clips == 1 else value - 1, math.nan if clips == 1 else value + 1],
            "default_ahead": {"sdr": sdr["default"] - value, "interval_95": [math.nan, math.nan]},
            "by_sources": {"2": {"sdr": value}},
            "by_object": {"dog": {"sdr": value, "sdr_improvement": value}},
        }
        for name, value in sdr.items()
    }
    return {
        "separators": entries,
        "struck_beside_pitched": {"clips": clips, "separators": entries},
        "clips": [{"objects": ["dog"]}] * clips,
        "basis_accuracy": 0.5,
        "basis_accuracy_by_sources": {"2": 0.5},
        "silent_auc": None,
        "map": 0.5,
        "calibration": {"sound_score": None},
    }


def test_a_separator_that_is_no_use_is_called_so():
    assert (
        results_report.verdicts(results_of(mixture=-1.0, default=5.0, paper=-0.5, ideal_mask=9.0, nmf_clustering=3.0))
        == []
    )
    said = results_report.verdicts(
        results_of(mixture=-1.0, default=-2.1, paper=-3.0, ideal_mask=9.0, nmf_clustering=3.0)
    )
    assert said == [
        "default is worse than doing nothing: 1.1 dB below the mixture as it is; more training clips may help",
        "paper is worse than doing nothing: 2.0 dB below the mixture as it is",
        "default is 5.1 dB worse than nmf clustering, which learns nothing; more training clips may help",
    ]
    lines = results_report.console_table(results_of(mixture=-1.0, default=-2.1))
    assert lines[-1].startswith("default is worse than doing nothing")


def test_clips_of_one_object_alone_are_no_reproach():
    """Doing nothing is perfect there, as in the protocol `absent`; no separator can be better."""
    assert results_report.verdicts(results_of(mixture=150.0, default=8.6, nmf_clustering=135.4)) == []


def test_no_gap_is_told_to_a_mixture_that_is_perfect():
    """Of an object that sounds alone doing nothing leaves no error: nobody can be ahead of it, or behind."""
    rng = np.random.default_rng(0)
    sound = torch.from_numpy(rng.normal(size=(1, 8000)).astype(np.float32))
    noisy = sound + 0.3 * torch.from_numpy(rng.normal(size=(1, 8000)).astype(np.float32))
    case = evaluation.Case(
        Segment("one", "one.wav"), sound[0], ["dog"], sound, torch.zeros(8000), vocabulary=AUDIOSET_23
    )
    figures = evaluation.figures_of(case, {"mixture": sound, "nmf_clustering": noisy / 2, "default": noisy})
    found = results.summarize([evaluation.ClipResult("one", ["dog"], figures)])
    table = {row[0]: row for _, row in results_report.table_rows(found)}
    assert float(table["mixture"][1]) > 100 and table["mixture"][6] == "–"
    assert float(table["nmf clustering"][6]) == pytest.approx(0, abs=0.1)
    gains = {row[0]: row for _, row in results_report.table_rows(found, evaluation.GAINS)}
    assert gains["default"][1] == gains["mixture"][1] == "–"


def test_figures_read_well():
    assert [results_report.decibels(x) for x in (-0.04, 0.04, -0.06, None, math.nan)] == [
        "0.0",
        "0.0",
        "−0.1",
        "–",
        "–",
    ]
    one, two = results_of(1, mixture=0.0, default=1.0), results_of(2, mixture=0.0, default=1.0)
    assert "95 % of SDR" not in results_report.table_header(one) and "95 % of SDR" in results_report.table_header(two)
    for found, duets in ((one, "1 duet of"), (two, "2 duets of")):
        assert all(len(row) == len(results_report.table_header(found)) for _, row in results_report.table_rows(found))
        report = Report("title")
        results_report.add_results(report, found, "objects")
        page = report.html()
        assert duets in page and page.index('class="bars"') < page.index("<dl>") < page.index("<details>")
        for term in ("SDR", "SIR", "SAR", "SI-SDR", "mixture", "default"):
            assert f"<dt>{term}</dt>" in page
        assert "<dt>paper</dt>" not in page


def test_a_report_folds_scrolls_and_draws_bars():
    report, more = Report("title"), Report("")
    report.bars([("bound", "low", -5.0, "-5.0"), ("ours", "high", 15.0, "15.0")], "dB")
    more.table(["a", "b"], [("", ["<x>", "2"])], "a table")
    report.fold("More", more)
    page = report.html()
    assert "left: 0.0%; width: 25.0%" in page and "left: 25.0%; width: 75.0%" in page
    assert "<details><summary>More</summary>" in page and "&lt;x&gt;" in page
    assert '<div class="scroll" tabindex="0" role="group" aria-label="a table">' in page
    assert "prefers-color-scheme: dark" in page


def test_wide_figures_scroll_on_a_narrow_page_and_small_ones_shrink():
    sound = np.zeros(4800, np.float32)
    for n_sounds, wide in ((3, True), (1, False)):
        report = Report("figures")
        figure = plots.overview(np.zeros((9, 16, 3), np.uint8), [("dog", sound)] * n_sounds, STFT())
        report.image(figure, "A <figure>")
        page = report.html()
        assert ('aria-label="A &lt;figure&gt;"><img class="wide"' in page) == wide and page.count("<img") == 1
