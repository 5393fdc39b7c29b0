"""Collect the recordings: fetch Debian packages, unpack them, and write one FLAC file per sound.

Calls `apt-get download PACKAGE` and `dpkg -x`, which need no root. Writes OUT/sounds/OBJECT/SOURCE__NAME.flac,
48 kHz mono, OUT/sounds/manifest.csv, which says where each comes from and its licence, and OUT/licences/PACKAGE,
the package's copyright file.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import generated
import numpy as np
import soundfile
import sources
from scipy.signal import resample_poly
from soundfonts import RATE, Bank, drum_patches, patch_of

LONGEST_S, MOST_PIECES, MOST_FILES = 6.0, 4, 60
PLUCKED = {"banjo": 1.5, "acoustic_guitar": 3.0, "harp": 4.0, "marimba": 1.5, "piano": 6.0, "electric_guitar": 4.0}
_AUDIO = (".wav", ".ogg", ".flac", ".mp3")
_FIELDS = ("object", "file", "source", "package", "version", "licence", "of")


def fetch(package: str, out: Path) -> tuple[Path, str]:
    """Download and unpack a package once; return where it lies, and its version."""
    debs, folder = out / "debs", out / "unpacked" / package
    debs.mkdir(parents=True, exist_ok=True)
    found = sorted(debs.glob(f"{package}_*.deb"))
    if not found:
        print(f"collect: fetching {package}", flush=True)
        try:
            subprocess.run(["apt-get", "-q", "download", package], cwd=debs, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{package}: {error}; run this on Debian 12, after `apt-get update`") from None
        found = sorted(debs.glob(f"{package}_*.deb"))
    if not folder.exists():
        partial = folder.with_name(package + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(found[-1]), str(partial)], check=True)
        partial.rename(folder)
    notice = folder / "usr/share/doc" / package / "copyright"
    (out / "licences").mkdir(exist_ok=True)
    if notice.exists():
        shutil.copyfile(notice, out / "licences" / package)
    return folder, found[-1].name.split("_")[1].replace("%3a", ":")


def instruments(font: sources.Soundfont, path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Play the instruments of a sound bank: (object, name, sound)."""
    gravis = path.is_dir()
    bank = None if gravis else Bank(path)
    for object_, programs in sources.PROGRAMS.items():
        if object_ == "offscreen_effects" and font.source == "csoundgm":
            continue  # of its effects and animals nothing is used
        for program, low, high, step in programs:
            patch = patch_of(path, program) if gravis else None
            if not (patch if gravis else bank.has(0, program)):
                continue
            for i, key in enumerate(range(low, high + 1, step)):
                velocity = font.velocities[i % len(font.velocities)]
                seconds = 5.0 if object_ == "offscreen_effects" else 2.4
                if patch:
                    x = patch.note(key, seconds, PLUCKED.get(object_))
                else:
                    x = bank.note(0, program, key, velocity, seconds)
                yield object_, f"p{program:03d}-{key:03d}-v{velocity}", x
    if gravis:
        for key, patch in drum_patches(path, sources.DRUM_KEYS):
            yield "drum", f"hit-{key:03d}", patch.hit()
    else:
        yield from drums(font, bank)


def drums(font: sources.Soundfont, bank: Bank) -> Iterator[tuple[str, str, np.ndarray]]:
    """Strike each drum of a sound bank's kits."""
    for kit in sources.DRUM_KITS:
        for i, key in enumerate(sources.DRUM_KEYS if bank.has(128, kit) else ()):
            velocity = font.velocities[i % len(font.velocities)]
            yield "drum", f"k{kit:03d}-{key:03d}-v{velocity}", bank.note(128, kit, key, velocity, 1.5)


def effects(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Play the sound effects."""
    bank = Bank(path)
    for object_, programs in sources.EFFECTS.items():
        for number, program in programs:
            for key in (57, 60, 64):
                yield object_, f"effect-b{number}-p{program}-{key}", bank.note(number, program, key, 100, 5.0)


def recordings(of: sources.Recordings, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Read the sound files that a source names: (path, sound)."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    chosen: list[tuple[str, Path | bytes]] = []
    for pattern in of.files:
        container, _, member = pattern.partition(":")
        for path in files:
            name = str(path.relative_to(folder))
            if not fnmatch.fnmatch(name, container):
                continue
            if member:
                chosen += [(f"{name}:{m}", data) for m, data in members(path) if fnmatch.fnmatch(m, member)]
            elif path.suffix.lower() in _AUDIO and not _left_out(name, container):
                chosen.append((name, path))
    if len(chosen) > MOST_FILES:  # evenly, in the order of their names
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, MOST_FILES).astype(int)]
    for name, content in chosen:
        try:
            x, rate = soundfile.read(io.BytesIO(content) if isinstance(content, bytes) else content, dtype="float32")
        except soundfile.LibsndfileError:
            print(f"collect: {name} can't be read; left out", flush=True)
            continue
        x = x if x.ndim == 1 else x.mean(1)
        yield name, resample_poly(x, RATE, rate).astype(np.float32) if rate != RATE else x


def _left_out(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatch(name, p) and p.strip("*")[:4] not in pattern for p in sources.NOT_TAKEN)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Take apart a file that holds many: OpenTTD's sound catalogue, or X-Moto's archive."""
    data = path.read_bytes()
    if path.suffix == ".cat":
        n = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
        for i in range(n):
            start, size = struct.unpack_from("<II", data, 8 * i)
            start &= 0x7FFFFFFF
            yield f"{i:02d}", data[start + data[start] + 1 :][:size]
        return
    names = [Path(m.decode()).name for m in re.findall(rb"[\w/]+/Sounds/[\w.]+\.wav(?= )", data)]
    starts = [m.start() for m in re.finditer(rb"RIFF....WAVE", data, re.DOTALL)]
    for name, start in zip(names, starts, strict=False):
        yield name, data[start : start + 8 + struct.unpack_from("<I", data, start + 4)[0]]


def pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    """Cut a sound from its first to its last audible sample, and a long one into pieces."""
    peak = np.abs(x).max(initial=0)
    loud = np.flatnonzero(np.abs(x) > 0.01 * peak)
    if peak < 1e-3 or len(loud) < 2000:
        return
    x = x[max(0, loud[0] - 240) : loud[-1] + 2400] * (0.7 / peak)
    size = int(LONGEST_S * RATE)
    apart = max(size, len(x) // MOST_PIECES)  # a long one's pieces are spread over it
    for start in range(0, len(x), apart):
        piece = x[start : start + size]
        if len(piece) > RATE or start == 0:
            yield piece


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of packages, sounds and licences")
    out = parser.parse_args().out
    sounds = out / "sounds"
    shutil.rmtree(sounds, ignore_errors=True)
    sounds.mkdir(parents=True)
    with (sounds / "manifest.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, _FIELDS)
        rows.writeheader()

        def keep(object_: str, source: str, name: str, package: str, version: str, licence: str, x: np.ndarray) -> None:
            short = re.sub(r"[^\w.-]+", "-", name.removeprefix("usr/share/").removeprefix("games/"))[-80:]
            (sounds / object_).mkdir(exist_ok=True)
            for i, piece in enumerate(pieces(x)):
                to = f"{object_}/{source}__{short}{f'-{i}' if i else ''}.flac"
                soundfile.write(sounds / to, piece, RATE, subtype="PCM_16")
                rows.writerow(dict(zip(_FIELDS, (object_, to, source, package, version, licence, name), strict=True)))

        for font in sources.SOUNDFONTS:
            folder, version = fetch(font.package, out)
            for object_, name, x in instruments(font, folder / font.path):
                keep(object_, font.source, name, font.package, version, font.licence, x)
        font = sources.EFFECTS_FONT
        folder, version = fetch(font.package, out)
        for object_, name, x in effects(folder / font.path):
            keep(object_, font.source, name, font.package, version, font.licence, x)
        for object_, name, x in generated.sounds():
            keep(object_, "generated", name, "", "", "this project's own", x)
        for of in sources.RECORDINGS:
            folder, version = fetch(of.package, out)
            n = 0
            for name, x in recordings(of, folder):
                keep(of.object, of.source, name, of.package, version, of.licence, x)
                n += 1
            if not n:
                raise SystemExit(f"{of.package} {version} holds none of {', '.join(of.files)}")
    for folder in sorted(p for p in sounds.iterdir() if p.is_dir()):
        print(f"collect: {folder.name}: {len(list(folder.glob('*.flac')))} sounds")


if __name__ == "__main__":
    main()
