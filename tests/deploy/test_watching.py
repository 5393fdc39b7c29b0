"""What watches a run: the log, the metrics that the dashboard and the alerts name, the runbook's procedures."""

import contextlib
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from avsep import shards, stages
from avsep.service import config, hotmodel
from avsep.service.config import ServiceConfig
from avsep.service.service import Service
from avsep.videos import FileLimits
from pipelines import audit, console, extract, runners
from tests.support import serving
from tests.support.cluster import free_port
from tests.support.sounds import table

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "avsep.json").read_text())
ALERTS = [r for g in yaml.safe_load((DEPLOY / "grafana" / "alerts.yaml").read_text())["groups"] for r in g["rules"]]
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
QUERIES = [t["expr"] for p in PANELS for t in p["targets"]]
OF_GPUS = ("ray_node_gpus_", "ray_node_gram_")  # there are none here
promtool, prometheus = shutil.which("promtool"), shutil.which("prometheus")


def named() -> set[str]:
    """Every metric that the dashboard or an alert names."""
    return {m for text in (*QUERIES, *(a["expr"] for a in ALERTS)) for m in re.findall(r"\b(?:ray_|avsep_)\w+", text)}


def exported(text: str) -> set[str]:
    """The sample names that a metrics page declares."""
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE):
        names |= {f"{name}_{x}" for x in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


# ------------------------------------------------------------------------------------- the log


@pytest.fixture
def broken(tmp_path) -> Path:
    """Four segments, of which two can be had."""
    path = table(tmp_path / "t", 4)
    (path.parent / "1.wav").unlink()
    (path.parent / "2.wav").write_bytes(b"")
    return path


def test_the_log_names_each_rejection_once(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AVSEP_LOG", "json")
    arguments = ["--segments", str(broken), "--out", str(tmp_path / "o"), "--in-process"]
    assert extract.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert not out and all(re.fullmatch(r"\d{4}-.*\.\d{3}Z", x["time"]) and x["level"] == "info" for x in lines)
    rejected = {x["segment_id"]: x for x in lines if x.get("event") == "rejected"}
    assert {i: (x["stage"], x["reason"]) for i, x in rejected.items()} == {
        "s1": ("decode", "missing"),
        "s2": ("decode", "empty"),
    }
    (done,) = (x for x in lines if x.get("event") == "shard_done")
    (commit,) = shards.read_commits(str(tmp_path / "o"))
    assert (done["shard"], done["clips"], done["rejected"]) == (commit.shard, 2, 2)
    assert {x["shard"] for x in rejected.values()} == {commit.shard}

    assert extract.main([*arguments[:4], "--segments", "no such table"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["level"] == "error" and "no such table" in json.loads(line)["message"]


def test_a_terminals_text_stays_text(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("AVSEP_LOG", raising=False)
    assert extract.main(["--segments", str(broken), "--out", str(tmp_path / "o"), "--in-process"]) == 0
    out, err = capsys.readouterr()
    assert "2 clips and 2 rejections of 4 segments" in out and "s1" not in out and "{" not in out + err


def test_what_a_run_survives_is_logged_with_its_shard(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AVSEP_LOG", "json")
    tries = []

    def disturbed(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise OSError("s3://key:hunter2@bucket/x doesn't answer")
        return stages.extract_records(*arguments)

    arguments = extract.parser().parse_args(["--segments", str(broken), "--out", str(tmp_path / "o"), "--in-process"])
    assert extract.run(arguments, process=disturbed) == 0
    err = capsys.readouterr().err
    (event,) = (x for x in map(json.loads, err.splitlines()) if x.get("event") == "not_written")
    assert event["shard"] == shards.read_commits(str(tmp_path / "o"))[0].shard
    assert "s3://…@bucket/x doesn't answer" in event["message"] and "hunter2" not in err


def test_secrets_are_cut_out_and_the_line_stays_json(capsys, monkeypatch):
    monkeypatch.setenv("AVSEP_LOG", "json")
    text = 'no "https://host/y?token=s3cr3t": 403\nby http://me:s3/cr3t@proxy:80'
    console.say(text, detail=["ftp://me:s3cr3t@host/x"], attempts=3)
    line = json.loads(capsys.readouterr().err)
    assert line["message"] == 'no "https://host/y?…": 403\nby http://…@proxy:80' and line["attempts"] == 3
    assert line["detail"] == ["ftp://…@host/x"]


def test_logs_of_the_service_are_objects_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("AVSEP_LOG", "json")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    console.log_as_asked()
    console.log_as_asked()  # each replica does
    try:
        raise RuntimeError("https://u:pass@h/x?a=1&X-Amz-Signature=0123&b=2 failed")
    except RuntimeError:
        config.log.exception("job %s", "abc")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("error", "avsep.service", "job abc")
    assert "RuntimeError: https://…@h/x?a=1&…&b=2 failed" in told["exception"]


# ---------------------------------------------------------------------- dashboard and alerts


def test_the_dashboard_is_one_that_grafana_can_import():
    assert DASHBOARD["uid"] == "avsep" and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "an id belongs to one Grafana"
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    ours = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["pipeline"]["datasource"] == ours
    for panel in PANELS:
        assert panel["title"] and panel["type"] in ("stat", "timeseries") and panel["datasource"] == ours
        assert panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"] == ours and target["expr"] and target["refId"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"pipeline", "__rate_interval"}
    cells = [(x, y) for p in DASHBOARD["panels"] for g in [p["gridPos"]]
             for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]  # fmt: skip
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "panels overlap"


def test_every_alert_has_its_page_and_every_page_its_alert():
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    pages = set(re.findall(r"^### (Avsep\w+)$", runbook, re.MULTILINE))
    assert pages == {a["alert"] for a in ALERTS}
    for alert in ALERTS:
        assert alert["annotations"]["runbook_url"] == f"deploy/RUNBOOK.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"] and alert["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(not promtool, reason="needs promtool, of Debian's package prometheus")
def test_prometheus_reads_every_query(tmp_path):
    rules = [
        {"record": f"q{n}", "expr": q.replace("$__rate_interval", "1m").replace("$pipeline", ".*")}
        for n, q in enumerate(QUERIES)
    ]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]}))
    for path in (tmp_path / "queries.yaml", DEPLOY / "grafana" / "alerts.yaml"):
        subprocess.run([promtool, "check", "rules", str(path)], check=True, capture_output=True)
    config = [promtool, "check", "config", str(DEPLOY / "grafana" / "prometheus.yaml")]
    subprocess.run(config, check=True, capture_output=True)


DONE, REMOVED = (f'ray_avsep_items_total{{pipeline="extract",outcome="{o}"}}' for o in ("done", "removed"))
PAUSED, ACTIVE = (f'ray_avsep_egress_identities{{state="{s}"}}' for s in ("paused", "active"))
LEFT = 'ray_avsep_left{pipeline="extract"}'
DISK = 'ray_node_disk_utilization_percentage{ip="10.0.0.7"}'
FAILED = 'ray_avsep_failures_total{pipeline="extract",shard="00007-ab",reason="not_written"}'
ANSWERS = 'avsep_requests_total{method="POST",route="/v1/separations",status="%d"}'
SITUATIONS = {  # alert: series and their values, one a minute; "a+bx200" grows by b
    "AvsepNothingDone": {LEFT: "500x200", DONE: "7x200"},
    "AvsepManyRejections": {DONE: "0+6x200", REMOVED: "0+5x200"},
    "AvsepAllIdentitiesPaused": {LEFT: "500x200", DONE: "0+1x200", PAUSED: "3x200", ACTIVE: "0x200"},
    "AvsepShardFailing": {FAILED: "_x150 2x50"},
    "AvsepDiskNearlyFull": {DISK: "93x200"},
    "AvsepServiceErrors": {ANSWERS % 500: "0+1x200"},
    "AvsepServiceFull": {ANSWERS % 503: "0+9x200", "avsep_pending": "16x200", "avsep_pending_limit": "16x200"},
    "": {  # all as it should be, a shard that failed hours ago included
        LEFT: "500x200", DONE: "0+8x200", REMOVED: "0+2x200", PAUSED: "1x200", ACTIVE: "2x200", FAILED: "2x200",
        DISK: "70x200", ANSWERS % 201: "0+9x200", "avsep_pending": "3x200", "avsep_pending_limit": "16x200",
    },
}  # fmt: skip


@pytest.mark.skipif(not promtool, reason="needs promtool, of Debian's package prometheus")
def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    assert set(SITUATIONS) == {"", *(a["alert"] for a in ALERTS)}
    tests = []
    for firing, series in SITUATIONS.items():
        queries = [
            {"expr": f'count(ALERTS{{alertname="{a["alert"]}",alertstate="firing"}}) or vector(0)', "eval_time": "3h",
             "exp_samples": [{"value": int(a["alert"] == firing)}]}
            for a in ALERTS
        ]  # fmt: skip
        given = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"interval": "1m", "input_series": given, "promql_expr_test": queries})
    content = {"rule_files": [str(DEPLOY / "grafana" / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------- what is really exported


@contextlib.contextmanager
def web_server(folder: Path, refuse: int) -> Iterator[int]:
    """Serve a folder's files on loopback, after so many answers of 'too many requests'."""
    left = [refuse]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                if left[0] > 0:
                    left[0] -= 1
                    self.send_error(429)
                else:
                    super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def service_metrics(folder: Path) -> str:
    folder.mkdir()
    return Service(ServiceConfig(model="", results=str(folder)), run=None).metrics.expose().decode()  # type: ignore[arg-type]


def value(page: str, name: str) -> float | None:
    """The sum of a metric's samples; labels follow its name."""
    name, *labels = name.split()
    lines = [x for x in page.splitlines() if x.startswith(name + "{") and all(t in x for t in labels)]
    return sum(float(x.rpartition(" ")[2]) for x in lines) if lines else None


VALUES = {  # of the run below
    'ray_avsep_items_total pipeline="extract" outcome="done"': 3,
    'ray_avsep_items_total pipeline="extract" outcome="removed"': 1,
    "ray_avsep_left": 0,
    "ray_avsep_in_flight": 0,
    'ray_avsep_failures_total reason="not_written"': 1,
    'ray_avsep_egress_identities state="paused"': 1,
    'ray_avsep_egress_identities state="active"': 1,
    'ray_avsep_egress_downloads_total outcome="ok"': 3,
    'ray_avsep_egress_downloads_total outcome="egress_blocked"': 1,
}


@contextlib.contextmanager
def prometheus_of(page: str, folder: Path) -> Iterator[Callable[[str], list[dict]]]:
    """Start Prometheus as deploy/ configures it, on this one page, once a second; gives what answers a query."""
    config = yaml.safe_load((DEPLOY / "grafana" / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["rule_files"] = [str(DEPLOY / "grafana" / "alerts.yaml")]
    (ray,) = (c for c in config["scrape_configs"] if c["job_name"] == "ray")
    ray["static_configs"] = [{"targets": [page.removeprefix("http://").removesuffix("/metrics")]}]
    del ray["file_sd_configs"]
    folder.mkdir()
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"

    def ask(expression: str) -> list[dict]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    command = [prometheus, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield ask
        finally:
            process.kill()


def unanswered(page: str, folder: Path) -> set[str]:
    """The dashboard's queries of Ray's metrics for which Prometheus has nothing after two minutes, GPUs' apart."""
    missing = {q for q in QUERIES if "ray_" in q and not any(name in q for name in OF_GPUS)}
    assert len(missing) > 15
    with prometheus_of(page, folder) as ask:
        deadline = time.monotonic() + 120
        while missing and time.monotonic() < deadline:
            time.sleep(2)
            with contextlib.suppress(OSError):
                filled = {q: q.replace("$pipeline", ".*").replace("$__rate_interval", "1m") for q in missing}
                missing = {q for q, expression in filled.items() if not ask(expression)}
    return missing


@pytest.mark.slow
def test_a_run_exports_what_dashboard_and_alerts_name(tmp_path, monkeypatch, capsys):
    """Downloads, one of which is refused and one removed, and a shard that can't be written at first."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("AVSEP_LOG", "json")
    table(tmp_path / "www", 3, seconds=1.0)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("# Netscape HTTP Cookie File\n")
    disturbed = str(tmp_path / "disturbed")

    def process(*arguments):
        if not os.path.exists(disturbed):
            Path(disturbed).touch()
            raise OSError("the store doesn't answer")
        return stages.extract_records(*arguments)

    with web_server(tmp_path / "www", refuse=1) as port, runners.session() as runner:
        assert isinstance(runner, runners.OnRay)
        import ray

        rows = [f"s{i},http://127.0.0.1:{port}/{i if i < 3 else 'gone'}.wav,drum" for i in range(4)]
        (tmp_path / "t.csv").write_text("\n".join(["segment_id,source,labels", *rows]) + "\n")
        cookies = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
        arguments = ["--segments", str(tmp_path / "t.csv"), "--out", str(tmp_path / "o"), "--rate", "100000",
                     "--media", str(tmp_path / "m"), "--cookies", *cookies]  # fmt: skip
        assert extract.run(extract.parser().parse_args(arguments), process=process) == 0
        wanted = {m for m in named() if m.startswith("ray_") and not m.startswith(OF_GPUS)}
        page = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
        text, found, deadline = "", {}, time.monotonic() + 120
        while not (found == VALUES and wanted <= exported(text)) and time.monotonic() < deadline:
            time.sleep(2)  # nodes are told every ten seconds
            with contextlib.suppress(OSError):
                text = urllib.request.urlopen(page, timeout=5).read().decode()
            found = {name: value(text, name) for name in VALUES}
        nothing = unanswered(page, tmp_path / "prometheus") if prometheus else set()
    assert not nothing
    assert not wanted - exported(text)
    assert found == VALUES
    assert 1.8e5 < value(text, "ray_avsep_egress_allowance") < 2e5  # one pauses for some ten minutes of the hour
    assert value(text, 'ray_avsep_stage_seconds_total stage="factorize"') > 0
    assert not {m for m in named() if m.startswith("avsep_")} - exported(service_metrics(tmp_path / "results"))

    events = [json.loads(x) for x in capsys.readouterr().err.splitlines() if x.startswith("{")]
    assert [x["segment_id"] for x in events if x.get("event") == "rejected"] == ["s3"]
    (again,) = (x for x in events if x.get("event") == "retried")
    assert (again["stage"], again["reason"], again["attempt"]) == ("fetch", "egress_blocked", 1)
    assert again["shard"] and again["segment_id"]


# -------------------------------------------------------------------- the runbook's procedures


def test_a_damaged_shard_is_done_again_once_its_commit_is_removed(tmp_path, capsys):
    out = tmp_path / "o"
    arguments = ["--segments", str(table(tmp_path / "t", 3)), "--out", str(out), "--in-process"]
    assert extract.main(arguments) == 0
    before = shards.read_ids(str(out))
    (victim,) = (out / "clips").iterdir()
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert audit.main(["--clips", str(out), "--out", str(tmp_path / "card")]) == 1
    assert f"damaged: clips/{victim.name}" in capsys.readouterr().out
    for commit in shards.read_commits(str(out)):
        if commit.clips.path == f"clips/{victim.name}":
            (out / "commits" / f"{commit.shard}-g{commit.generation}.json").unlink()
    assert extract.main(arguments) == 0
    assert shards.read_ids(str(out)) == before
    assert audit.main(["--clips", str(out), "--out", str(tmp_path / "card")]) == 0


def test_a_model_behind_a_link_is_rolled_back_by_turning_the_link(tmp_path):
    for name in ("old", "new"):
        serving.write_model(tmp_path / name, recipe=name)
    link = tmp_path / "model"
    link.symlink_to("new")
    time.sleep(1.1)  # a model is taken up when its files are a second old
    model = hotmodel.HotModel(str(link), None, FileLimits())
    assert model().separator.model.config.recipe == "new"
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "link").rename(link)
    assert model().separator.model.config.recipe == "old"
