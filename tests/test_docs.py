"""What documents say of the code: pages and tables are current, every command and argument that they name exists."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import avsep
from avsep import cli
from avsep.service import config
from deploy import cost, pages
from tests.support import prose
from tests.support.house import SHARED

ROOT = Path(__file__).parent.parent
TEXTS = sorted(
    path
    for pattern in ("README.md", ".github/CONTRIBUTING.md", "deploy/**/*", "notebooks/*.ipynb", "pipelines/*.py")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in ("", ".md", ".yaml", ".py", ".ipynb", ".json") and path.name != "PIPELINES.md"
)
STARTS = re.compile(
    r"(?:(?<=[\s`\"'(+])|^)(?P<program>python -m (?:pipelines|tests\.benchmarks)\.\w+|avsep (?:separate|inspect|label)"
    r"|(?:python )?deploy/\w+\.py|(?:\./)?deploy/submit|ray (?:start|up|down|dashboard|attach|exec|stop|status|submit)"
    r"|ray job \w+)(?=[\s`'\";])"
)
LETTERS = re.compile(r"[A-Z][A-Z_]*|…|\.\.\.|\[.*|<.*")  # what stands for a value


LONGEST = {  # words per sentence
    "README.md": 25,
    ".github/CHANGELOG.md": 30,
    ".github/CONTRIBUTING.md": 30,
    ".github/SECURITY.md": 30,
    "deploy/README.md": 30,
    "deploy/REFERENCE.md": 30,
    "deploy/RUNBOOK.md": 30,
    "deploy/SERVICE.md": 30,
}


def text_of(path: Path) -> str:
    """What a reader sees: of a notebook its cells, of a manifest its comments and its jobs' commands."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix == ".yaml" and path.parent.name == "kuberay":
        comments = "\n".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
        documents = [d for d in yaml.safe_load_all(text) if d["kind"] == "RayJob"]
        return "\n".join([comments, *(d["spec"]["entrypoint"] for d in documents)])
    return text


def commands(text: str) -> list[list[str]]:
    """Find the commands of a text: from a program's name to the end of its line, its quote or its shell command."""
    text = re.sub(r"\\+\n\s*", " ", text)
    found = []
    for match in STARTS.finditer(text):
        line = text[match.start() :].split("\n", 1)[0]
        before = text[: match.start()][-1:]
        if before in ("`", '"', "'") and before in line:
            line = line.split(before, 1)[0]
        line = re.split(r"\s+#|\s+(?:&&|\|\|?|;|>|·)\s|;\s|`|\s\(|\\n", line, maxsplit=1)[0]
        try:
            words = shlex.split(line.rstrip(" .,:"))
        except ValueError:  # a quote that ends after it, or an apostrophe
            words = re.split(r"[\"']", line)[0].split()
        if words and words[0] == "python" and words[1:2] != ["-m"]:
            words = words[1:]
        found.append(words)
    return found


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]] | None:
    """Return a command's real parser and its arguments; None for those that aren't argparse's."""
    if words[:2] == ["python", "-m"]:
        package, _, name = words[2].rpartition(".")
        assert (ROOT / package.replace(".", "/") / f"{name}.py").exists(), f"there is no {words[2]}"
        if package == "pipelines":
            return importlib.import_module(words[2]).parser(), words[3:]
    if words[0] == "avsep":
        return cli.parser(), words[1:]
    return None


def flags_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match("--[a-z]", word)]


def mistake(words: list[str]) -> str:
    """Say what is wrong with a command, in the words of the program itself; nothing if it is right."""
    if words[0] == "ray":
        return ray_mistake(words)
    known = parser_of(words)
    if known is None:
        return script_mistake(words)
    parser, arguments = known
    options = {option: action for action in parser._actions for option in action.option_strings}
    if words[0] == "avsep":
        (commands_,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        options = {o: a for a in commands_.choices[arguments[0]]._actions for o in a.option_strings}
    if not arguments[words[0] == "avsep" :]:  # named, not run
        return ""
    flags = set(flags_of(arguments))
    complete = all(flags & set(a.option_strings) for a in options.values() if a.required)
    if not complete or any(LETTERS.fullmatch(word) for word in arguments):  # a part of a command, or a pattern
        beam = {"--runner", "--flink_master"} if words[2:3] and words[2].endswith(("manifest", "audit")) else set()
        return "".join(f"{' '.join(words)}: no {flag}" for flag in sorted(flags - options.keys() - beam))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parser.parse_known_args(arguments) if "--runner" in arguments else parser.parse_args(arguments)
        except SystemExit:
            return said.getvalue()
    return ""


def script_mistake(words: list[str]) -> str:
    """The same for files that are run, and for benchmarks: their --help names their arguments."""
    flags = flags_of(words)
    if words[0] == "python":
        command = [sys.executable, *words[1:3]]
    else:
        file = ROOT / words[0].removeprefix("./")
        command = [sys.executable, str(file)]
        if file.name == "submit":  # its own arguments, a pipeline's name, and that one's arguments
            programs = [i for i, w in enumerate(words) if w in pages.WRITES]
            if programs and (
                wrong := mistake(["python", "-m", f"pipelines.{words[programs[0]]}", *words[programs[0] + 1 :]])
            ):
                return wrong
            flags = flags_of(words[: programs[0] if programs else None])
        assert file.exists(), f"there is no {words[0]}"
    if not flags:
        return ""
    help_text = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return "".join(f"{' '.join(words)}: no {f}" for f in flags if f not in help_text)


def ray_mistake(words: list[str]) -> str:
    """The same for Ray's commands."""
    from ray.scripts.scripts import cli as ray_cli

    command, rest = ray_cli, words[1:]
    while hasattr(command, "commands"):
        if rest[0] not in command.commands:
            return f"{' '.join(words)}: no {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if "--" in rest:
        rest = rest[: rest.index("--")]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return "".join(f"{' '.join(words)}: no {w}" for w in flags_of(rest) if w not in known)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_argument_exists(path: Path) -> None:
    assert not [wrong for words in commands(text_of(path)) if (wrong := mistake(words))]


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_argument_named_alone_exists(path: Path) -> None:
    parsers = [importlib.import_module(f"pipelines.{name}").parser() for name in pages.WRITES]
    parsers += next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    named = {flag for span in re.findall(r"`(--[^`]+)`", text_of(path)) for flag in flags_of(span.split())}
    assert not named - known - {"--runner"}


def test_every_variable_named_is_read_by_something() -> None:
    code = "".join(p.read_text() for folder in ("avsep", "pipelines", "tests") for p in (ROOT / folder).rglob("*.py"))
    read = set(re.findall(r"[\"'](AVSEP_[A-Z_]+)[\"']", code))
    read |= {f"AVSEP_SERVE_{f.name.upper()}" for f in dataclasses.fields(config.ServiceConfig)}
    named = {name for path in TEXTS if path.suffix != ".py" for name in re.findall(r"AVSEP_[A-Z_]+", path.read_text())}
    assert len(named) > 8 and not named - read


def test_the_check_sees_mistakes() -> None:
    text = (
        "Run `python -m pipelines.extract --segmnets x --out y`, then\n"
        "    python -m pipelines.train --clips a \\\n        --out b --recipe paper --epochs x  # slow\n"
        "avsep separate duet.mp4 --modell out/run/model --out out/duet && ls\n"
        "ray start --head --dashbord-host=0.0.0.0\nray job submitt x\n"
    )
    found = commands(text)
    assert found[1] == [
        "python",
        "-m",
        "pipelines.train",
        "--clips",
        "a",
        "--out",
        "b",
        "--recipe",
        "paper",
        "--epochs",
        "x",
    ]
    assert len(found) == 5 and all(mistake(words) for words in found)
    assert not mistake(["python", "-m", "pipelines.train", "--clips", "a", "--out", "b"])
    with pytest.raises(AssertionError):
        mistake(["python", "-m", "pipelines.trian"])


def test_texts_with_commands_are_among_those_read() -> None:
    counts = {str(path.relative_to(ROOT)): len(commands(text_of(path))) for path in TEXTS}
    assert counts["README.md"] > 10 and counts["deploy/kuberay/extract.yaml"] >= 1 and counts["deploy/vms.yaml"] >= 3


def test_the_programs_page_is_current() -> None:
    assert pages.PAGE.read_text() == pages.page(), "run python deploy/pages.py"
    shared = {"__init__", *SHARED}
    programs = {p.stem for p in (ROOT / "pipelines").glob("*.py")} - shared
    assert set(pages.WRITES) == programs


def test_the_costs_are_current() -> None:
    readme = (ROOT / "deploy" / "README.md").read_text()
    shown = readme.split(cost.MARKS[0])[1].split(cost.MARKS[1])[0]
    assert shown == cost.table(cost.read_rates(None)), "run python deploy/cost.py --write"


def test_costs_follow_from_what_goes_in() -> None:
    rates = {"decode": 0.2, "factorize": 0.1, "record": 0.0, "label": 0.55, "train": 0.005, "read": 0.001}
    rates["collect"] = 0.0
    laptop, box, cluster = (cost.hours(shape, rates) for shape in cost.SHAPES)
    assert laptop["downloads"] == pytest.approx(190_000 / 300)
    assert laptop["extraction"] == pytest.approx(190_000 * 0.85 / (8 * 0.85) / 3600)
    assert box["extraction"] == pytest.approx(190_000 * 0.2 / (8 * 0.85) / 3600)  # decoding, here
    fast_decoding = cost.hours(cost.SHAPES[1], rates | {"decode": 1e-4})
    each = 19.3e9 / (0.25 * 30.3e12) + 10 * 23e9 / (0.25 * 121e12)  # the GPU's work
    assert fast_decoding["extraction"] == pytest.approx(190_000 * each / 3600)
    assert cluster["training"] == pytest.approx(12 * 190_000 * 0.001 / 4 / 3600)
    assert cluster["downloads"] == pytest.approx(laptop["downloads"] / 4)


def test_sentences_are_told_apart() -> None:
    text = """# A heading of any length is no sentence

    One sentence ends here. *Another* one, with .5 and `a.b. C` in it, ends there!
    Is `code` first? `x` is; and e.g. this goes on up to
    51. Yes.

    - An item
      of two lines
    - another

    | a | table |
    ```
    code. More. Code.
    ```
    1. One.
    2. Two, with [a link. And more](https://example.org/a.b).
    """
    lines = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    found = [s for block in prose.blocks(lines) for s in prose.sentences(block)]
    assert [prose.words(s) for s in found] == [4, 10, 3, 10, 1, 5, 1, 1, 4, 2]
    assert [s for s in found if "51" in s] == ["`code` is; and e.g. this goes on up to 51."]
    assert prose.too_much(["word " * 31]) == [f"31 words: {'word ' * 31}"] and not prose.too_much(["word " * 30])
    assert prose.too_much(["word " * 18] * 5) == ["mean 18.0 words per sentence"]


@pytest.mark.parametrize("name", LONGEST)
def test_documents_are_easy_to_read(name: str) -> None:
    found = prose.of_document(ROOT / name)
    assert found and not prose.too_much(found, LONGEST[name])


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_docstrings_are_easy_to_read() -> None:
    modules = sorted(p for folder in ("avsep", "pipelines") for p in (ROOT / folder).rglob("*.py"))
    wrong = {str(p.relative_to(ROOT)): w for p in modules if (w := prose.too_much(prose.of_docstrings(p)))}
    print(f"{len(wrong)} of {len(modules)} modules have docstrings that are hard to read")
    assert not wrong


def test_docstrings_are_read_without_their_examples(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""One two. Three:\n\n    a table of words\n\n>>> code()\n\'output\'\n"""\n\n'
        'class A:\n    """Four."""\n    def b(self):\n        """Five six."""\n'
        '    def _c(self):\n        """Seven."""\n'
    )
    assert prose.of_docstrings(module) == ["One two.", "Three:", "Four.", "Five six."]


def test_every_setting_of_the_service_is_described() -> None:
    named = re.findall(r"^\| `(AVSEP_SERVE_[A-Z_]+)` \|", (ROOT / "deploy" / "SERVICE.md").read_text(), re.MULTILINE)
    assert named == [f"AVSEP_SERVE_{f.name.upper()}" for f in dataclasses.fields(config.ServiceConfig)]


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (path.parent / name) if name else path
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in anchors, target


@pytest.mark.parametrize("name", sorted(set(avsep.__all__) - {"OBJECT_NAMES"}))
def test_public_names_are_shown_in_an_example(name: str) -> None:
    shown = getattr(avsep, name)
    assert any(">>>" in (d.__doc__ or "") for d in (shown, *vars(shown).values()))
