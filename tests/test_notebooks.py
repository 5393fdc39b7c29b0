"""The notebooks: stored without outputs, and executed from end to end on a demo's output."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_there_are_three():
    assert [p.stem for p in NOTEBOOKS] == ["01_one_clip", "02_dataset", "03_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_they_are_stored_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(code) > 5 and not any(c.outputs or c.execution_count for c in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "nothing of the machine that wrote it"


def test_one_clip_imports_avsep_alone():
    """Beside arrays, figures and players: the whole method is plain functions."""
    code = "\n".join(c.source for c in read(FOLDER / "01_one_clip.ipynb").cells if c.cell_type == "code")
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert names - sys.stdlib_module_names == {"avsep", "numpy", "torch", "matplotlib", "IPython"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The output of a demo: the one that AVSEP_DEMO names, else one of the smallest size."""
    if given := os.environ.get("AVSEP_DEMO"):
        return Path(given)
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "pipelines.demo", "--clips", "20", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_they_run(path, demo, monkeypatch):
    import nbclient

    monkeypatch.setenv("AVSEP_DEMO", str(demo))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    files = {p: p.stat().st_mtime_ns for p in demo.rglob("*")}
    notebook = read(path)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    noise = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not noise, "a reader should see no warnings"
    kinds = [kind for o in outputs for kind in o.get("data", {})]
    assert kinds.count("image/png") >= 5
    if path.stem != "02_dataset":
        assert sum("<audio" in o.get("data", {}).get("text/html", "") for o in outputs) >= 8
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*")} == files, "reading changes nothing"
