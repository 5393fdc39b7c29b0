"""The commands of `avsep` on small sounds, with a network that knows dogs and violins by construction."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avsep import cli, commands, inputs, storage
from avsep import files as whole_files
from avsep.edits import Edits
from avsep.videos import VideoSeparator
from tests.support.planted import BOXES, add_labeller, write_painted
from tests.support.serving import write_model
from tests.support.streams import run_ffmpeg
from tests.support.tones import DOG, RATE, VIOLIN, model, tone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model().save(folder)
    return str(folder)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "duet.wav")


def write_sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (tone(DOG, 2.0) / 4 + tone(VIOLIN, 2.0, 2.0) / 4).numpy(), RATE, format="WAV")
    return path


def separate(*arguments: object) -> int:
    return cli.main(["separate", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------- outputs that would be inputs


def hard_link(file: Path, name: Path) -> Path:
    os.link(file, name)
    return name


def symbolic_link(file: Path, name: Path) -> Path:
    name.symlink_to(file)
    return name


def through_a_linked_folder(file: Path, name: Path) -> Path:
    name.symlink_to(file.parent)
    return name / file.name


NAMES = (lambda file, name: file, hard_link, symbolic_link, through_a_linked_folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", ["violin", "_rest"])
def test_an_input_is_never_overwritten_or_deleted(model_dir, sound, tmp_path, capfd, name, kept) -> None:
    out = tmp_path / "out"
    assert separate(sound, "--model", model_dir, "--out", out, "--objects", "violin,dog") == 0
    again = name(out / f"{kept}.wav", tmp_path / "other")
    before = contents(tmp_path)
    for objects in ("cello", "violin"):
        assert separate(again, "--model", model_dir, "--out", out, "--objects", objects) == 2
    complaint = capfd.readouterr().err.splitlines()[-1]
    assert f"--out {out} would overwrite or delete {again}; give another --out" in complaint
    assert contents(tmp_path) == before


def test_nor_by_the_separation_of_another_file(model_dir, sound, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert separate(sound, "--model", model_dir, "--out", out / "duet", "--objects", "violin") == 0
    before = contents(tmp_path)
    assert separate(out / "duet" / "violin.wav", sound, "--model", model_dir, "--out", out) == 2
    assert "would overwrite or delete" in capfd.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["Violin.WAV", "mine.wav", "separation.json", "relation_map.png"])
def test_a_folder_with_somebody_elses_files_is_refused(model_dir, sound, tmp_path, capfd, name) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"objects": [{"name": "violin"}, {"name": "mine"}]}')
    before = contents(tmp_path)
    assert separate(sound, "--model", model_dir, "--out", out) == 2
    assert f"{out} holds {name}, which no separation wrote; give another --out" in capfd.readouterr().err
    assert contents(tmp_path) == before


def test_only_what_a_report_names_is_deleted(model_dir, sound, tmp_path) -> None:
    out = tmp_path / "out"
    assert separate(sound, "--model", model_dir, "--out", out, "--objects", "violin,dog") == 0
    (out / "cello.wav.part").write_text("somebody's download")
    (out / "notes.txt").write_text("mine")
    assert separate(sound, "--model", model_dir, "--out", out, "--objects", "cello") == 0
    assert set(contents(out)) == {
        *("cello.wav", "_rest.wav", "separation.json", "relation_map.png", "notes.txt", "cello.wav.part")
    }
    shutil.copytree(model_dir, tmp_path / "model")
    assert separate(sound, "--model", tmp_path / "model", "--out", tmp_path / "model") == 2


def test_a_separation_that_fails_at_its_end_is_known_and_done_again(model_dir, sound, tmp_path) -> None:
    out = tmp_path / "out"
    command = (sound, "--model", model_dir, "--out", out, "--objects")
    assert separate(*command, "violin,dog") == 0
    (out / "relation_map.png").unlink()
    (out / "relation_map.png").mkdir()
    assert separate(*command, "cello") == 2
    assert json.loads((out / "separation.json").read_text())["unfinished"]
    (out / "relation_map.png").rmdir()
    assert separate(*command, "cello") == 0
    assert set(contents(out)) == {"cello.wav", "_rest.wav", "separation.json", "relation_map.png"}


# ---------------------------------------------------------------------------------- several files, and where they go


def test_several_files_get_a_folder_each(model_dir, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/duet.wav", "b/duet.wav", "b/solo.WAV", "b/.hidden.wav", "c/duet.flac.wav"):
        write_sound(Path(name))
    Path("b/list.csv").touch()
    command = ("--model", model_dir, "--objects", "dog", "--out", "out")
    assert separate("a/duet.wav", "b", "c/*.wav", "./a/../a/duet.wav", *command) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["a-duet.wav", "b-duet.wav", "duet.flac", "solo"]
    assert json.loads(Path("out/b-duet.wav/separation.json").read_text())["source"] == "b/duet.wav"
    said = capfd.readouterr().out
    assert "left out, as neither video nor sound by their names: b/list.csv" in said
    assert "4 of 4 files separated" in said
    assert separate("c", "--model", model_dir, "--objects", "dog", "--out", "one") == 0
    assert [p.name for p in Path("one").iterdir()] == ["duet.flac"]  # a folder is not a file


def test_what_cannot_be_separated_is_told_and_the_rest_done(model_dir, sound, tmp_path, capfd) -> None:
    (tmp_path / "text.mp4").write_text("no media")
    out = tmp_path / "out"
    assert separate(tmp_path / "text.mp4", sound, "--model", model_dir, "--out", out) == 1
    captured = capfd.readouterr()
    assert f"{tmp_path / 'text.mp4'}: unreadable" in captured.err and "1 of 2 files separated" in captured.out
    assert [p.name for p in out.iterdir()] == ["duet"]
    assert separate(tmp_path / "text.mp4", tmp_path / "text.mp4", "--model", model_dir, "--out", out) == 2


def test_out_is_named_after_the_file_unless_given(model_dir, sound, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert separate(sound, "--model", model_dir, "--objects", "dog") == 0
    assert (tmp_path / "separated" / "duet" / "dog.wav").exists()
    assert separate(sound, "--model", model_dir, "--objects", "dog", "--out=~/duet") == 0
    assert (tmp_path / "home" / "duet" / "dog.wav").exists()


def test_names_that_collide_are_told_apart() -> None:
    files = ["a/x.mp4", "A/X.MP4", "b/a/x.mp4", "http://host/d/x.mp4?key=1", "..wav", "\udcff.wav", "s3://b/x.mp4"]
    names = inputs.distinct(files)
    assert len({n.casefold() for n in names}) == len(files)
    assert all(n not in ("", ".", "..") and "/" not in n and n.encode() for n in names)
    assert names[:4] == ["a-x.mp4", "A-X.MP4-2", "a-x.mp4-3", "d-x.mp4"] and names[4:6] == ["..wav", "\ufffd"]


def test_patterns_and_folders_without_files_are_told(model_dir, tmp_path, capfd) -> None:
    (tmp_path / "empty").mkdir()
    write_sound(tmp_path / "a[1].wav")
    assert inputs.find_files([str(tmp_path / "a[1].wav")])[0] == [str(tmp_path / "a[1].wav")]
    for name, words in (("*.mp4", "matches no file"), ("empty", "is a folder without videos or sounds")):
        assert separate(tmp_path / name, "--model", model_dir) == 2
        assert words in capfd.readouterr().err


def test_files_of_a_store_are_found(memory_folder) -> None:
    for name in ("a.wav", "b.wav", "c.txt"):
        storage.write_text(f"{memory_folder}/x/{name}", name)
    assert inputs.find_files([f"{memory_folder}/x"]) == (
        [f"{memory_folder}/x/a.wav", f"{memory_folder}/x/b.wav"],
        [f"{memory_folder}/x/c.txt"],
    )
    assert inputs.find_files([f"{memory_folder}/x/[b-c].*"])[0][0] == f"{memory_folder}/x/b.wav"


def test_label_takes_several_files_folders_and_patterns(tmp_path, capfd) -> None:
    """The pictures of each, which show one object; what isn't a video by its name is left out of a folder."""
    network = write_model(tmp_path / "model")
    add_labeller(network)
    for name in ("dog", "cat"):
        write_painted(tmp_path / f"{name}.mp4", {name: BOXES[name]}, 2.0)
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "videos").mkdir()
    (tmp_path / "cat.mp4").rename(tmp_path / "videos" / "cat.mp4")
    write_sound(tmp_path / "videos" / "duet.wav")
    named = [str(tmp_path / "[dt]*.mp4"), str(tmp_path / "videos")]
    assert cli.main(["label", *named, "--model", network]) == 1
    captured = capfd.readouterr()
    said = [line for line in captured.out.splitlines() if line.endswith(":") or "(label)" in line]
    assert [line.split("  ")[1] if "(label)" in line else line for line in said] == [
        *(f"{tmp_path}/dog.mp4:", "dog", f"{tmp_path}/videos/cat.mp4:", "cat")
    ]
    assert "left out, as no video by their names" in captured.out and "2 of 3 files labelled" in captured.out
    assert f"{tmp_path}/text.mp4: unreadable" in captured.err
    assert cli.main(["label", str(tmp_path / "videos" / "duet.wav"), "--model", network]) == 2
    assert "duet.wav has no pictures; give a video" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["separate", "text.mp4"], "text.mp4: unreadable"),
        (["separate", "quiet.mp4", "text.mp4"], "quiet.mp4: no_audio"),
        (["separate", "duet.wav", "--track", "2"], "duet.wav: no_audio"),
        (["separate", "duet.wav", "--video"], "duet.wav: no_video"),
        (["separate", "duet.wav", "--objects", "unicorn"], "unknown object 'unicorn'"),
        (["separate", "duet.wav", "--two-stems", "unicorn"], "unknown object 'unicorn'"),
        (["separate", "duet.wav", "--edit", "edits.json"], "unknown object 'unicorn'"),
        (["separate", "six.wav", "--format", "mp3"], "the sound has 6 channels"),
        (["label", "text.mp4"], "text.mp4: unreadable"),
        (["label", "duet.wav"], "duet.wav has no pictures; give a video"),
    ],
)
def test_what_files_tell_is_told_before_the_networks_are_loaded(
    model_dir, tmp_path, monkeypatch, capfd, arguments, words
) -> None:
    """Of a model whose weights are damaged its configuration is enough for that."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "damaged")
    Path("damaged/miml.safetensors").write_bytes(b"cut")
    Path("text.mp4").write_text("no media")
    Path("edits.json").write_text('{"add": ["unicorn"]}')
    write_sound(Path("duet.wav"))
    soundfile.write("six.wav", np.zeros((800, 6)), 8000)
    if "quiet.mp4" in arguments:
        run_ffmpeg("-f", "lavfi", "-i", "color=size=32x32:duration=1", "quiet.mp4")
    assert cli.main([*arguments, "--model", "damaged"]) == 2
    complaints = capfd.readouterr().err
    assert words in complaints and "safetensors" not in complaints


def test_what_is_being_done_is_told(tmp_path, monkeypatch, capfd) -> None:
    """No share is told where none is known; a network is loaded, once; pictures from all over a file are counted."""
    monkeypatch.setattr(commands, "SAY_NEXT_S", 0.0)
    with commands.progress() as step:
        step("decoding", 0.0)
        step("listening", 0.25)
    assert capfd.readouterr().err.splitlines() == ["decoding", "listening: 25%"]
    network = write_model(tmp_path / "model")
    add_labeller(network)
    video = write_painted(tmp_path / "dog.mp4", {"dog": BOXES["dog"]}, 3.0)
    separate_video, told = VideoSeparator.load(network), []
    for name in ("first", "second"):
        told.append([])
        separate_video(video, tmp_path / name, ["dog"], step=lambda stage, done: told[-1].append(stage))
    first, second = (list(dict.fromkeys(stages)) for stages in told)
    assert second == ["decoding", "looking", "listening", "separating"]
    assert first == ["decoding", "loading the picture network", *second[1:]]
    done = []  # with edits, bases are assigned before anything is rendered
    steps = {"step": lambda stage, share: done.append(share), "edits": Edits(add=("cat",))}
    separate_video(video, tmp_path / "edited", ["dog"], **steps)
    assert done == sorted(done) and done[-2:] == [0.4, 1.0]
    monkeypatch.setattr(whole_files, "MAX_PICTURES", 2)
    shares = []
    whole_files.images(video, 64, step=lambda stage, done: shares.append((stage, done)))
    assert [stage for stage, _ in shares] == ["decoding"] * 2 and 0 == shares[0][1] < shares[1][1]


def test_what_edits_do_not_change_is_told_again(model_dir, sound, tmp_path) -> None:
    """How familiar a sound is follows from the bases that the model gave each object, wherever they are moved."""
    command, out = (sound, "--model", model_dir, "--objects", "violin,dog", "--out"), tmp_path / "out"
    assert separate(*command, out) == 0
    before = json.loads((out / "separation.json").read_text())
    edits = {"moves": [{"basis": before["windows"][0]["bases"][0]["basis"], "to": "_rest"}], "add": ["cat"]}
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    assert separate(*command, tmp_path / "edited", "--edit", tmp_path / "edits.json") == 0
    after = json.loads((tmp_path / "edited" / "separation.json").read_text())
    known = {o["name"]: o["familiarity"] for o in after["objects"]}
    assert {o["name"]: o["familiarity"] for o in before["objects"]} == {n: known[n] for n in ("violin", "dog")}
    assert 0 <= known["cat"] <= 1


# ------------------------------------------------------------------------------------------- mistakes, told at once


def test_without_arguments_it_says_how_to_begin(capfd, monkeypatch) -> None:
    """Each of its commands, one to try, and where more is said, in a terminal's width; the status is a mistake's."""
    monkeypatch.setattr(sys, "argv", ["avsep"])
    assert cli.main() == cli.main([]) == 2
    out, told = capfd.readouterr()
    commands = re.findall(r"^\s{4}(\w+) {2,}", cli.parser().format_help(), re.M)
    assert not out and len(commands) == 3 and all(f"\n  avsep {name}  " in told for name in commands)
    assert "\n  avsep separate video.mp4\n" in told and "avsep --help" in told
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ["separate", "nosuch.wav", "--model", "MODEL"],
        ["separate", "SOUND", "--model", "nosuch"],
        ["separate", "SOUND", "--model", "SOUND"],
        ["separate", "SOUND", "--model", "MODEL", "--weights", "nosuch.pth"],
        ["separate", "SOUND", "--model", "MODEL", "--out", ""],
        ["separate", "SOUND", "--model", "MODEL", "--objects", "dog, unicorn"],
        ["separate", "SOUND", "--two-stems", "unicorn"],
        ["separate", "SOUND", "--model", "MODEL", "--edit", "SOUND"],
        ["separate", "SOUND", "--out", "pyproject.toml/sounds"],
        ["separate", "SOUND", "--out", "http://127.0.0.1:1/x"],
        ["separate", "SOUND", "--out", "s3:/bucket/x"],
        ["separate", "SOUND", "--track", "-2"],
        ["inspect", "nosuch"],
        ["inspect", "SOUND"],
        ["label", "nosuch.mp4"],
        ["label", "EMPTY"],
        ["separate", "EMPTY"],
        ["--version"],
    ],
)
def test_wrong_paths_and_names_are_told_before_anything_heavy_is_imported(model_dir, sound, arguments) -> None:
    (sound.parent / "empty.wav").touch()
    known = {"MODEL": model_dir, "SOUND": str(sound), "EMPTY": str(sound.parent / "empty.wav")}
    words = [known.get(a, a) for a in arguments]
    run = [sys.executable, "-X", "importtime", "-m", "avsep.cli", *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == (0 if arguments == ["--version"] else 2)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(told) == (0 if arguments == ["--version"] else 1)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "avsep.console" in imported and not imported & {"torch", "numpy", "pyarrow"}


def test_a_file_whose_name_is_not_utf_8_is_separated(model_dir, sound, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(sound, b"caf\xe9.wav")
    assert separate("caf\udce9.wav", "--model", model_dir, "--objects", "dog", "--out", "out") == 0
    assert sorted(os.listdir("out"))[:2] == ["_rest.wav", "dog.wav"] and not capfd.readouterr().err


def test_a_traceback_is_shown_where_it_is_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AVSEP_TRACEBACK", "1")
    for command in ("separate", "label"):
        with pytest.raises(FileNotFoundError, match="matches no file"):
            cli.main([command, str(tmp_path / "*.mkv")])


# ------------------------------------------------------------------------------------- output that can't be written


def run_avsep(shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    shell = shell.replace("avsep ", f"{sys.executable} -m avsep.cli ")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_a_separation_is_done_whatever_becomes_of_its_output(model_dir, sound, tmp_path) -> None:
    """Closed, and of an encoding that lacks the folder's name."""
    out = tmp_path / "音"
    command = f"avsep separate {sound} --model {model_dir} --objects dog --out '{out}'"
    assert run_avsep(f"{command} <&- >&- 2>&-").returncode == 0
    sounds = [soundfile.read(p)[0] for p in sorted(out.glob("*.wav"))]  # nobody else wrote to them
    assert np.abs(sum(sounds) - soundfile.read(sound)[0]).max() < 1e-3
    shutil.rmtree(out)
    done = run_avsep(command, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "") and (out / "dog.wav").exists()
    assert "\\u97f3/dog.wav: " in done.stdout


def test_output_that_cannot_be_written_is_told_once(model_dir, sound, tmp_path, capfd, monkeypatch) -> None:
    for arguments, status in (
        (["separate", str(sound), "--model", model_dir, "--objects", "dog", "--out", str(tmp_path / "out")], 0),
        (["inspect", model_dir], 2),  # to say it was all there was to do
    ):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert cli.main(arguments) == status
        monkeypatch.undo()
        assert capfd.readouterr().err.count(f"standard output can't be written: {os.strerror(errno.ENOSPC)}") == 1
    assert (tmp_path / "out" / "dog.wav").exists()


def test_a_reader_that_goes_is_no_failure(model_dir, capfd, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert cli.main(["inspect", model_dir]) == 0
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_one_line_and_leaves_nothing(model_dir, tmp_path) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, np.tile(tone(DOG, 10.0).numpy() / 4, 60), RATE)
    out = tmp_path / "out"
    run = [sys.executable, "-m", "avsep.cli", "separate", str(long), "--model", model_dir, "--out", str(out)]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if not re.match(r"\w+: \d+%$", line)] == ["avsep separate: interrupted"]
    assert not out.exists()
