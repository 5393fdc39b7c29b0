import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import avsep
from avsep.learning.finetuning import FinetuningConfig
from avsep.objects import AUDIOSET_23
from pipelines import RECIPES, finetune, recipes
from tests.support.house import SHARED

ROOT = Path(__file__).parent.parent

# From the ground up: a room (a folder) or a flat file may import those of its line, and of the lines above.
FLOORS = (
    "stft nmf objects metrics miml context evidence lite looks locating limits sites filesystems console starter edits",
    "storage conditional tables records lock factors dictionary familiarity",
    "media",
    "model separation baselines unet plots report",
    "fetching vision shards work labelled manifest audioset datasets synthetic",
    "stages extraction learning",
    "files videos outputs inputs stems separated evaluation protocols results results_report duplicates suspects "
    "audit datacard croissant",
    "service commands many exporting",
    "cli",
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = sorted(
    p.relative_to(ROOT / "avsep") for p in (ROOT / "avsep").rglob("*.py") if p.parts[-2:] != ("avsep", "__init__.py")
)
MODULES = [".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in FILES]
ROOMS = sorted({m.split(".")[0] for m in MODULES})
PIPELINES = sorted(p.stem for p in (ROOT / "pipelines").glob("*.py") if p.stem != "__init__")

# Every flag of every command. A new one needs a reason, and a line here.
FLAGS = {
    "demo": {"--out", "--clips", "--in-process"},
    "manifest": {
        "--table", "--audioset", "--music", "--ave", "--vggsound", "--ontology", "--own-node-only", "--objects",
        "--out",
    },
    "extract": {
        "--segments", "--out", "--recipe", "--weights", "--labeller", "--retry-rejected",
        "--in-process", "--profile", "--dry-run", "--media", "--until", "--rate", "--proxies", "--cookies",
    },
    "audit": {"--clips", "--out", "--model"},
    "train": {
        "--clips", "--out", "--recipe", "--start", "--without", "--epochs", "--resume", "--replace",
        "--tensorboard", "--in-process",
    },
    "finetune": {
        "--segments", "--clips", "--model", "--out", "--targets", "--weights", "--architecture", "--without",
        "--epochs", "--media", "--replace", "--in-process",
    },
    "collect": {"--model", "--clips", "--without", "--replace", "--in-process"},
    "evaluate": {
        "--model", "--paper-model", "--compare", "--segments", "--references", "--out", "--split", "--given",
        "--protocol", "--pairs", "--media", "--replace", "--in-process",
    },
    "separate": {
        "--videos", "--out", "--model", "--objects", "--weights", "--track", "--two-stems", "--format", "--mono",
        "--video", "--in-process",
    },
    "export": {"--clips", "--media", "--out", "--format", "--in-process"},
    "serve": {"--model", "--port", "--in-process"},
    "avsep separate": {
        "--model", "--out", "--objects", "--weights", "--track", "--two-stems", "--format", "--mono", "--video",
        "--edit",
    },
    "avsep inspect": set(),
    "avsep label": {"--model", "--weights", "--labeller"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, dotted; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.name
            base = f"{package}.{node.module}" if node.level and node.module else node.module or package
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def path_of(module: str) -> Path:
    path = ROOT / "avsep" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def own_imports(module: str) -> set[str]:
    """The modules of avsep that one of them imports, a room's for what is in its `__init__`."""
    names = {name.removeprefix("avsep.") for name in imports(path_of(module)) if name.startswith("avsep.")}
    return names & set(MODULES) - {module}


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    (tmp_path / "avsep").mkdir()
    file = tmp_path / "avsep" / "x.py"
    file.write_text(
        "import ray.train\nfrom avsep import nmf\nfrom . import stft\nfrom .miml import MIML\n"
        "def f():\n    import torch\n    importlib.import_module('beam')\n"
    )
    assert {"ray.train", "avsep.nmf", "avsep.stft", "avsep.miml", "torch", "beam"} <= imports(file)


# -------------------------------------------------------------------------------- import rules


def test_every_room_has_its_floor() -> None:
    """A new one needs a place in FLOORS."""
    assert set(ROOMS) == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    floor = FLOOR_OF[module.split(".")[0]]
    above = {m for m in own_imports(module) if FLOOR_OF[m.split(".")[0]] > floor}
    assert not above, f"avsep.{module} imports {sorted(above)}, which may import it"


def test_no_imports_in_a_circle() -> None:
    done: list[str] = []
    inside = {m: own_imports(m) - ({m.split(".")[0]} if "." in m else set()) for m in MODULES}
    left = {m: {n for n in needs if n.split(".")[0] != m or "." not in n} for m, needs in inside.items()}
    while ready := sorted(m for m, needs in left.items() if needs <= set(done)):
        done += ready
        left = {m: needs for m, needs in left.items() if m not in ready}
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_module(module: str) -> None:
    tree = ast.parse(path_of(module).read_text())
    mine = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    imported = {
        alias.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("avsep")
        for alias in n.names
        if alias.name.startswith("_")
    }
    modules = {
        alias.asname or alias.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("avsep")
        for alias in n.names
        if alias.name in {m.split(".")[-1] for m in MODULES}
    }
    reached = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        if n.value.id in modules & mine and n.attr.startswith("_") and not n.attr.startswith("__")
    }
    assert not imported | reached


def private_names(path: Path) -> set[str]:
    """Private names of avsep and pipelines that a file imports, reads or replaces."""
    tree, ours, found = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("avsep", "pipelines"):
            ours |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", whole := ast.unparse(node)):
            found |= {node.attr} if whole.split(".")[0] in ours | {"avsep", "pipelines"} else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            where, name = node.args[0], node.args[1]
            if ast.unparse(where).split(".")[0] in ours and isinstance(name, ast.Constant):
                found.add(name.value)
    return {name for name in found if name.startswith("_") and not name.endswith("_")}


def test_private_names_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        "from avsep.nmf import kl\nfrom pipelines.cluster import _a\nkl._b\nmonkeypatch.setattr(kl, '_c', 1)\n"
        "kl.parser()._theirs\nother._d\nkl.__doc__\n"
    )
    assert private_names(tmp_path / "t.py") == {"_a", "_b", "_c"}


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")))
def test_tests_know_no_private_name_of_what_they_test(file: str) -> None:
    assert not private_names(ROOT / file) - ({"_HOMES", "_MODULES"} if file == "tests/test_house.py" else set())


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_avsep_knows_no_scheduler_and_no_pipeline(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(path_of(module))}
    assert not roots & {"ray", "apache_beam", "pipelines", "deploy", "tests"}


@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if p != "demo"])
def test_pipelines_do_not_import_each_other(pipeline: str) -> None:
    names = imports(ROOT / "pipelines" / f"{pipeline}.py")
    others = {n.split(".")[1] for n in names if n.startswith("pipelines.")} & set(PIPELINES) - {pipeline}
    allowed = set() if pipeline == "recipes" else SHARED
    assert not others - allowed, f"pipelines.{pipeline} imports {sorted(others - allowed)}"


@pytest.mark.parametrize("file", [*(f"avsep/{f}" for f in FILES), *(f"pipelines/{p}.py" for p in PIPELINES)])
def test_functions_and_programs_are_short(file: str) -> None:
    """A program has at most 300 lines, a function 60; one that emits machine code may say why not."""
    text = (ROOT / file).read_text()
    assert not file.startswith("pipelines/") or len(text.splitlines()) <= 300
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {n.name for n in functions if n.end_lineno and n.end_lineno - n.lineno >= 60}
    assert not long - ({"_run"} if file == "avsep/nmf/amx.py" else set())


def test_only_the_cli_parses_arguments_in_avsep() -> None:
    assert [m for m in MODULES if "argparse" in imports(path_of(m))] == ["cli"]


def test_no_test_imports_another() -> None:
    """What several share is in tests/support/."""
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    names = {p: {n.split(".")[-1] for n in imports(p) if n.startswith("tests.")} for p in files}
    assert len(files) > 50 and not {p for p, found in names.items() if any(n.startswith("test_") for n in found)}


PROGRAMS = ["-m avsep.cli", *(f"-m pipelines.{p}" for p in PIPELINES if p not in SHARED)]
LIGHT = ["-c 'import avsep.service.connections'", *(f"{p} {word}" for p in PROGRAMS for word in ("--help", "--nosuch"))]


@pytest.mark.parametrize("command", LIGHT)
def test_help_and_mistakes_do_not_wait_for_what_takes_seconds_to_import(command: str) -> None:
    """Nor do Serve's proxies, which import avsep.service.connections alone."""
    run = [sys.executable, "-X", "importtime", *shlex.split(command)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == (2 if "--nosuch" in command else 0), done.stderr[-2000:]
    heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "pyarrow", "apache_beam", "ray"}
    found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "avsep" in found or "pipelines" in found
    assert not found & heavy


def test_a_separator_of_waveforms_needs_no_media_tables_or_scheduler() -> None:
    run = [sys.executable, "-X", "importtime", "-c", "from avsep import Separator"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    found = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in found and not found & {"ffmpeg", "imageio_ffmpeg", "pyarrow", "ray"}


def test_avseps_names_are_there_when_asked_for() -> None:
    assert set(avsep.__all__) == {name for names in avsep._HOMES.values() for name in names} <= set(dir(avsep))
    for name in avsep.__all__:
        assert getattr(avsep, name) is not None
    for name in avsep._MODULES:
        assert getattr(avsep, name).__name__ == f"avsep.{name}"
    with pytest.raises(AttributeError, match="module 'avsep' has no attribute 'nosuch'"):
        avsep.nosuch  # noqa: B018


def test_parsers_know_names_and_defaults_before_these_are_there() -> None:
    assert tuple(recipes.RECIPES) == RECIPES
    assert finetune.parser().parse_args(["--segments", "x", "--out", "y"]).epochs == FinetuningConfig.epochs


def test_no_drawer_for_odds_and_ends() -> None:
    odd = {"utils", "util", "helpers", "common", "misc", "config"}
    assert not odd & ({m.split(".")[-1] for m in MODULES if m != "service.config"} | set(PIPELINES))
    assert not [d for d in ("avsep", "pipelines", ".") for name in odd if (ROOT / d / name).is_dir()]


# -------------------------------------------------------------------------------- public names

SIGNATURES = {
    "stft.STFT": "(sample_rate=48000, n_fft=4800, hop_length=2400)",
    "stft.STFT.__call__": "(self, waveform)",
    "stft.STFT.inverse": "(self, spectrogram, length)",
    "nmf.factorize": "(V, n_bases, *, n_iter=200, seeds=None, W0=None, H0=None, accelerated=False)",
    "nmf.infer_activations": "(V, W, *, n_iter=100, H0=None)",
    "nmf.kl_divergence": "(V, W, H)",
    "objects.object_scores": "(image_logits, classes='everyday', *, joined=False)",
    "objects.weak_labels": "(scores, threshold=0.3, best_threshold=0.05)",
    "miml.MIML.forward": "(self, bases, valid=None, statistics=None)",
    "miml.MIML.relation": "(self, bases, valid=None, statistics=None)",
    "miml.multilabel_margin": "(scores, labels)",
    "dictionary.select_bases": "(posteriors, objects, threshold=0.5)",
    "dictionary.BasisDictionary.load": "(path)",
    "separation.ratio_masks": "(magnitudes, power=1.0)",
    "separation.separate": "(waveform, masks, stft)",
    "separation.Separator.load": "(model_dir=None)",
    "separated.separate_file": "(path, objects=None, model=None, *, track=1, mono=False, edits=None)",
    "separated.separate_sound": "(samples, sample_rate, objects=None, model=None, *, edits=None)",
    "metrics.si_sdr": "(reference, estimate)",
    "metrics.bss_eval": "(references, estimates, *, filter_length=512)",
    "records.validate": "(record, vocabulary=AUDIOSET_23)",
    "shards.read_ids": "(out)",
    "stages.extract_record": "(segment, config, label)",
    "vision.ImageLabeller.load": "(architecture='resnet152', weights=None, device='cpu')",
}


class Name(str):
    """What stands for a long value."""

    __repr__ = str.__str__


FIELDS = {
    "Segment": "segment_id source start_s end_s split objects labels",
    "Clip": "waveform sample_rate images notes",
    "ClipRecord": "segment_id source start_s end_s split objects labels bases activations activation_scale "
    "basis_energy image_logits kl_divergence duration_s rms_db media_sha256 label_source",
    "Rejection": "segment_id stage reason transient attempts detail",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name: str) -> None:
    module, *path = name.split(".")
    found = importlib.import_module(f"avsep.{module}")
    for part in path:
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = [
        p.replace(annotation=p.empty, default=Name("AUDIOSET_23") if p.default is AUDIOSET_23 else p.default)
        for p in signature.parameters.values()
    ]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == SIGNATURES[name]


def test_network_first_arguments() -> None:
    from avsep.miml import MIML

    defaults = {n: p.default for n, p in inspect.signature(MIML).parameters.items()}
    assert list(defaults.items())[:4] == [
        ("n_bins", 2401),
        ("n_objects", 23),
        ("n_subconcepts", 4),
        ("hidden", 1024),
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_records_have_the_contracts_fields(name: str) -> None:
    from avsep import records

    assert list(getattr(records, name).__dataclass_fields__) == FIELDS[name].split()


# ------------------------------------------------------------------------------------ commands


def help_text(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--help` prints, with exit status 0."""
    module, *words = ("avsep.cli", command.split()[1]) if " " in command else (f"pipelines.{command}",)
    main = importlib.import_module(module).main
    try:
        status = main([*words, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert not status
    return capsys.readouterr().out


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_has_help_with_exactly_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(command, capsys)
    found = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}
    assert FLAGS[command] <= found
    assert found <= FLAGS[command], "a new flag needs a reason, and a line in FLAGS"


@pytest.mark.parametrize("command", FLAGS)
def test_every_commands_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = command if " " in command else f"python -m pipelines.{command}"
    assert f"{call} " in re.sub(r"\s+", " ", help_text(command, capsys).split("examples:")[1])


def test_every_pipeline_is_a_command_of_the_contract() -> None:
    assert set(PIPELINES) - SHARED == {c for c in FLAGS if " " not in c}


@pytest.mark.parametrize("command", ["extract", "train", "collect", "evaluate"])
def test_arguments_that_miss_end_with_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"pipelines.{command}").main([])
    assert stop.value.code == 2 and "required" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- README


def tree_paths(block: str) -> list[str]:
    """Read the files (with a dot) and folders (with a slash) that start a tree's lines, by indentation."""
    name = r"(?:[\w.-]*\.\w+|[\w.-]+/)(?=\s|$)"
    above: list[tuple[int, str]] = []
    paths = []
    for line in block.splitlines():
        if match := re.match(rf"([\s│├└─|`+-]*)({name}(?:\s+{name})*)", line):
            column, names = len(match[1]), match[2].split()
            above = [(c, folder) for c, folder in above if c < column]
            paths += [(above[-1][1] if above else "") + n for n in names]
            if names[0].endswith("/"):
                above.append((column, "" if names[0] == "./" else paths[-1]))
    return paths


def test_trees_are_read_in_both_ways_of_drawing() -> None:
    plain = "a.toml b.md   what it needs\navsep/\n  stft.py   waveforms, and\n            back again\ndeploy/  k8s"
    drawn = "./\n├── a.toml b.md\n├── avsep/\n│   └── stft.py  waveforms\n└── deploy/"
    expected = ["a.toml", "b.md", "avsep/", "avsep/stft.py", "deploy/"]
    assert tree_paths(plain) == expected and tree_paths(drawn)[1:] == expected


def test_the_trees_name_real_files_and_every_module() -> None:
    named = []
    for document in ("README.md", ".github/CONTRIBUTING.md"):
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
        trees = [tree_paths(b) for b in blocks if "stft.py" in b and "avsep/" in b]
        assert len(trees) == 1, f"one code block of {document} shows the tree"
        assert not [p for p in trees[0] if not (ROOT / p).exists()]
        named.append(set(trees[0]))
    modules = {f"avsep/{f}" for f in FILES if f.name != "__init__.py"} | {f"pipelines/{p}.py" for p in PIPELINES}
    assert not modules - named[1], "the tree of .github/CONTRIBUTING.md lacks these"
    assert len(named[0] & modules) >= 12
