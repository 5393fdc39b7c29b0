"""A training's figures elsewhere: each row once, in TensorBoard's files as in `history.json`."""

import json
import math
import time
from pathlib import Path

import pytest

from avsep import storage
from avsep.learning.logs import TensorBoard
from pipelines import train
from pipelines.epochs import following
from tests.support.clips import records, write
from tests.support.uris import everything

ROWS = [
    {"pass": 1, "epoch": 0, "train_loss": 0.75, "val_map": 0.5, "learning_rate": 0.01},
    {"pass": 2, "epoch": 0, "train_loss": 0.25, "val_map": math.nan, "learning_rate": 0.001},
]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: tag → step → value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def check(found: dict[str, dict[int, float]], rows: list[dict]) -> None:
    assert set(found) == {n.replace("train_", "train/").replace("val_", "val/") for n in rows[0]} - {"epoch"}
    for name, values in found.items():
        expected = {i: row[name.replace("/", "_")] for i, row in enumerate(rows)}
        assert values == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_rows_are_scalars_at_once(where: str, tmp_path: Path, request) -> None:
    folder = str(tmp_path / "board") if where == "local" else request.getfixturevalue("s3_folder")
    board = TensorBoard(folder)

    def shown() -> dict[str, dict[int, float]]:
        if where == "local":
            return scalars(tmp_path / "board")
        for name, data in everything(folder).items():
            storage.write_bytes(str(tmp_path / "copy" / name), data)
        return scalars(tmp_path / "copy")

    for n, row in enumerate(ROWS, 1):
        board(row)
        check(shown(), ROWS[:n])
    board.close()
    check(shown(), ROWS)
    assert len(list((tmp_path / ("board" if where == "local" else "copy")).iterdir())) == 1


def test_a_training_that_goes_on_replaces_what_was_shown(tmp_path: Path) -> None:
    for loss in (0.9, 0.6):
        board = TensorBoard(tmp_path)
        for row in ROWS:
            board(row | {"train_loss": loss})
        board.close()
        (path,) = tmp_path.glob("events.*.*.*.*")  # files are told apart by their second
        path.rename(tmp_path / f"events.out.tfevents.{1 if loss == 0.9 else 2}")
    assert scalars(tmp_path)["train/loss"] == pytest.approx({0: 0.6, 1: 0.6})


def test_every_row_is_given_once_as_it_comes(tmp_path: Path, capfd) -> None:
    given: list[dict] = []

    def broken(row: dict) -> None:
        raise RuntimeError("no room")

    def write_rows(n: int) -> None:
        storage.write_text(str(tmp_path / "history.json"), json.dumps(rows[:n]))

    rows = [{"pass": 1, "epoch": i, "train_loss": 1 / (i + 1), "seconds": 0.1} for i in range(3)]
    write_rows(1)  # of before: this one goes on
    with following(str(tmp_path), 3, [broken, given.append]):
        deadline = time.monotonic() + 30
        while not given and time.monotonic() < deadline:
            time.sleep(0.05)
        assert given == rows[:1]
        write_rows(3)
    assert given == rows
    (line,) = capfd.readouterr().err.splitlines()
    assert "a log failed (RuntimeError('no room')) and gets no more rows; history.json has them all" in line


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("clips"), records(30), 10)


def command(clips: Path, out: Path, *more: object) -> list[str]:
    return [*map(str, ["--clips", clips, "--out", out, "--recipe", "paper", "--in-process", *more])]


@pytest.mark.slow
def test_training_gives_every_row_to_tensorboard_and_to_any_function(clips, tmp_path, monkeypatch) -> None:
    out, given = tmp_path / "run", []
    assert train.main(command(clips, out, "--epochs", 2, "--tensorboard", tmp_path / "board"), log=given.append) == 0
    rows = json.loads((out / "history.json").read_text())
    assert given == rows and len(rows) == 2
    check(scalars(tmp_path / "board"), rows)
    monkeypatch.setenv("AVSEP_TENSORBOARD", str(tmp_path / "other"))

    assert train.main(command(clips, out, "--epochs", 3, "--resume"), log=given.append) == 0
    rows = json.loads((out / "history.json").read_text())
    assert len(rows) == 3 and given[2:] == rows  # those of before, too
    check(scalars(tmp_path / "other"), rows)


def test_a_board_that_is_a_file_stops_before_the_training(clips, tmp_path, capfd) -> None:
    (tmp_path / "board").write_text("")
    assert train.main(command(clips, tmp_path / "run", "--tensorboard", tmp_path / "board")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'board'}: a file is in the way; give a folder" in line
    assert not (tmp_path / "run" / "history.json").exists()
