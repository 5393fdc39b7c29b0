"""The image's build steps, read from deploy/Dockerfile and run in an empty root, as no Docker engine is asked for."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
NEED = 9_000_000_000  # bytes, by its packages' sizes: 7.8 GB when it is built, and downloads of the last large step


def instructions(text: str) -> list[tuple[str, str]]:
    """Read a Dockerfile: instruction and the rest of its line, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def installed(folder: Path) -> list[metadata.Distribution]:
    """CUDA's libraries as pip has unpacked them for this Python: the image's versions, on the folder's disk."""
    pinned = dict(re.findall(r"^(nvidia-.+)==(.+)$", (ROOT / "deploy" / "constraints.txt").read_text(), re.MULTILINE))
    found = [d for d in metadata.distributions() if pinned.get(d.name.lower().replace("_", "-")) == d.version]
    return [d for d in found if Path(str(d.locate_file(""))).stat().st_dev == folder.stat().st_dev]


def files(distributions: Iterable[metadata.Distribution]) -> list[tuple[Path, str]]:
    """Every file of distributions that need no certain Python, and where it is among the packages."""
    here = [(Path(str(f.locate())), str(f)) for d in distributions for f in d.files or [] if f.suffix != ".pyc"]
    return [(path, name) for path, name in here if path.is_file() and not name.startswith("..")]


class Image:
    """A root folder in which a Dockerfile's instructions are carried out, by chroot."""

    def __init__(self, root: Path, context: Path) -> None:
        self.root, self.context = root, context
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        self.environment |= {k: v for k, v in os.environ.items() if k.startswith("PIP_")}  # this machine's registry
        self.folder, self.user = "/", "0"

    def run(self, command: str, user: str = "") -> str:
        """Run a shell command in the root."""
        ids = f"{user or self.user}:{user or self.user}"
        done = subprocess.run(
            ["nice", "chroot", f"--userspec={ids}", self.root, "sh", "-ec", f"cd {self.folder}; {command}"],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
        return done.stdout

    def link(self, distributions: Iterable[metadata.Distribution]) -> None:
        """Have packages installed in the image's environment, as pip would: its files are replaced, never changed."""
        (packages,) = self.root.glob("opt/avsep/lib/python*/site-packages")
        for path, name in files(distributions):
            (packages / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, packages / name)

    def do(self, instruction: str, rest: str) -> None:
        """Carry out an instruction."""
        if instruction == "FROM":
            match = re.fullmatch(r"debian:(\w+)-slim", rest)
            assert match, f"FROM {rest}: this test makes Debian roots"
            subprocess.run(["nice", "debootstrap", "--variant=minbase", match[1], self.root], check=True, stdout=-3)
            for archive in (self.root / "var/cache/apt/archives").glob("*.deb"):  # which Debian's own images lack
                archive.unlink()
            for name in ("etc/resolv.conf", "etc/pip.conf"):
                if Path("/", name).exists():
                    shutil.copy(Path("/", name), self.root / name)
            if "PIP_CERT" in self.environment:  # a registry behind a certificate of this machine's own
                shutil.copy(self.environment["PIP_CERT"], self.root / "etc" / "registry.crt")
                self.environment["PIP_CERT"] = "/etc/registry.crt"
        elif instruction in ("ENV", "ARG"):
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                self.environment[name] = value
        elif instruction == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, target = rest.split()
            into = Path(os.path.normpath(self.root / self.folder.lstrip("/") / target))
            for source in sources:
                path = self.context / source
                if path.is_dir():  # its contents
                    shutil.copytree(path, into, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, into / path.name if into.is_dir() else into)
        elif instruction == "RUN":
            self.run(rest)
        elif instruction == "USER":
            self.user = rest
            entries = [line.split(":") for line in (self.root / "etc" / "passwd").read_text().splitlines()]
            self.environment["HOME"] = next(e[5] for e in entries if rest in (e[0], e[2]))
        else:
            raise AssertionError(f"{instruction}: this test doesn't know it")


def test_dockerfiles_are_read() -> None:
    text = "# a\nFROM x # no comment\nRUN a \\\n # inside\n && b\nCOPY c d"
    assert [(i, " ".join(r.split())) for i, r in instructions(text)] == [
        ("FROM", "x # no comment"), ("RUN", "a && b"), ("COPY", "c d"),
    ]  # fmt: skip


def test_the_image_ends_as_an_ordinary_user() -> None:
    users = [rest for instruction, rest in instructions(DOCKERFILE.read_text()) if instruction == "USER"]
    assert users and users[-1] not in ("0", "root")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root and debootstrap")
def test_the_image_builds_and_works(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """CUDA's libraries, which are most of it, are linked where this Python has the same ones."""
    cuda = installed(tmp_path)
    need = NEED - sum(path.stat().st_size for path, _ in files(cuda))
    if (free := shutil.disk_usage(tmp_path).free) < need:
        pytest.skip(f"the image takes {need:,} bytes while it is built; {tmp_path} has {free:,} free")
    rendered = request.getfixturevalue("rendered")
    image = Image(tmp_path / "root", ROOT)
    try:
        for instruction, rest in instructions(DOCKERFILE.read_text()):
            image.do(instruction, rest)
            if instruction == "ENV":  # the environment is made, and empty
                image.link(cuda)
        home = image.root / image.folder.lstrip("/")
        shutil.copytree(rendered, home / "media")
        image.run("chown -R 1000:1000 media", user="0")
        assert image.run("id -u").strip() == "1000"
        assert image.run("ffmpeg -version").startswith("ffmpeg version")
        image.run("ray --version; avsep --help; python -m pipelines.serve --help; test ! -e /build/pyproject.toml")
        image.run("python -m pipelines.manifest --table media/segments.csv --out out/manifest")
        image.run("python -m pipelines.extract --segments out/manifest --out out/clips --in-process")
        assert "14 clips and 0 rejections" in image.run("avsep inspect out/clips")
    finally:
        shutil.rmtree(image.root)
