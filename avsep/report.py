"""One self-contained HTML page: tables, figures and players."""

from __future__ import annotations

import base64
import io

import jinja2
import numpy as np
import soundfile
from markupsafe import Markup
from numpy.typing import NDArray

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title>
<style>
 :root { --text: #222; --paper: #fff; --faint: #5a5a5a; --line: #ddd; --bar: #8fb8de; --ours: #1f6fb4; --bound: #c8c8c8 }
 @media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --paper: #161616; --faint: #a6a6a6; --line: #3a3a3a; --bar: #3f6b94; --ours: #64b0f0; --bound: #565656 }
 }
 body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; color: var(--text); background: var(--paper) }
 h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
 p, dl { max-width: 46rem } dt { font-weight: 600; float: left; margin-right: .4em } dt::after { content: ':' } dd { margin: 0 0 .3rem }
 table { border-collapse: collapse } .caption { color: var(--faint); margin: .8rem 0 .3rem }
 th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; white-space: nowrap }
 th:first-child, td:first-child { text-align: left; padding-left: 0 } thead th { border-bottom: 2px solid var(--faint) }
 tr.bound td { color: var(--faint); font-style: italic } tr.ours td, .ours th { font-weight: 600 }
 .scroll { overflow-x: auto; margin-bottom: .8rem }
 .bars { width: 100%; max-width: 46rem } .bars th { font-weight: normal } .bars th, .bars td { border: 0; padding: .15rem .5rem .15rem 0 }
 .bars td:nth-child(2) { width: 99% } .bars i { display: block; position: relative; height: 1rem }
 .bars b { position: absolute; height: 100%; background: var(--bar) } .ours b { background: var(--ours) } .bound b { background: var(--bound) }
 img { max-width: 100%; height: auto; background: #fff } .sounds { display: flex; flex-wrap: wrap; gap: 1rem }
 figure { margin: 0; width: 16rem; max-width: 100% } figure img { width: 100% } audio { width: 100%; height: 2.2rem }
 img.wide { max-width: max(100%, 44rem) } @media (max-width: 30rem) { figure { width: 100% } }
 figcaption { font-size: .85rem; color: var(--faint) }
 details { margin: .8rem 0 } summary { cursor: pointer; font-weight: 600 }
</style></head><body><main>
<h1>{{ title }}</h1>
{% for block in blocks %}{{ block }}
{% endfor %}</main></body></html>
"""
_TABLE = """{% if caption %}<p class="caption">{{ caption }}</p>{% endif %}
<div class="scroll" tabindex="0" role="group" aria-label="{{ caption or header[0] }}"><table>
<thead><tr>{% for c in header %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for kind, row in rows %}<tr{% if kind %} class="{{ kind }}"{% endif %}>{% for c in row %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>"""
_BARS = """<p class="caption">{{ caption }}</p><table class="bars"><tbody>
{% for kind, label, value, left, width in rows %}<tr{% if kind %} class="{{ kind }}"{% endif %}><th scope="row">{{ label }}</th>
<td><i aria-hidden="true"><b style="left: {{ left }}%; width: {{ width }}%"></b></i></td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>"""
_TERMS = """<dl>{% for term, sentence in terms %}<dt>{{ term }}</dt><dd>{{ sentence }}</dd>{% endfor %}</dl>"""
_IMAGE = """{% if wide %}<div class="scroll" tabindex="0" role="group" aria-label="{{ alt }}"><img class="wide" alt="{{ alt }}" src="{{ src }}"></div>
{% else %}<p><img alt="{{ alt }}" src="{{ src }}"></p>{% endif %}"""
_SOUND = """<figure>{% if image %}<img alt="Spectrogram of {{ caption }}" src="{{ image }}">{% endif %}
<audio controls preload="none" aria-label="{{ caption }}" src="{{ sound }}"></audio><figcaption>{{ caption }}</figcaption></figure>"""

_PLAYERS = """<div style="display: flex; flex-wrap: wrap; gap: 1rem">
{% if note %}<p style="width: 100%">{{ note }}</p>{% endif %}{% for f in figures %}<figure style="margin: 0; width: 20rem">
<img style="width: 100%" alt="Spectrogram of {{ f.caption }}" src="{{ f.image }}">
<audio style="width: 100%" controls preload="none" aria-label="{{ f.caption }}" src="{{ f.sound }}"></audio>
<figcaption>{{ f.caption }}</figcaption></figure>{% endfor %}</div>"""

_WIDE = 600  # pixels
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # in Hz
_templates = jinja2.Environment(autoescape=True)


class Report:
    """A page built from the top down."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks: list[Markup] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self._blocks.append(Markup("<h{0}>{1}</h{0}>").format(level, text))

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append(Markup("<p>{}</p>").format(text))

    def table(self, header: list[str], rows: list[tuple[str, list[str]]], caption: str = "") -> None:
        """Add a table; each row comes with its kind: `ours`, `bound` or empty."""
        self._blocks.append(self._render(_TABLE, header=header, rows=rows, caption=caption))

    def bars(self, rows: list[tuple[str, str, float, str]], caption: str) -> None:
        """Add a chart of a bar a row: its kind, as in `table`, its name, its length and what is written for that."""
        low, high = min(0.0, *(r[2] for r in rows)), max(0.0, *(r[2] for r in rows))
        scale = 100 / ((high - low) or 1.0)
        drawn = [
            (kind, name, text, round((min(0.0, value) - low) * scale, 1), round(max(0.3, abs(value) * scale), 1))
            for kind, name, value, text in rows
        ]
        self._blocks.append(self._render(_BARS, rows=drawn, caption=caption))

    def terms(self, terms: list[tuple[str, str]]) -> None:
        """Add a list of terms and what each means."""
        self._blocks.append(self._render(_TERMS, terms=terms))

    def fold(self, summary: str, other: Report) -> None:
        """Add everything of another report, shown when its summary is clicked."""
        inside = Markup("\n").join(other._blocks)
        self._blocks.append(Markup("<details><summary>{}</summary>{}</details>").format(summary, inside))

    def image(self, png: bytes, alt: str) -> None:
        """Add a picture; on a narrow page a wide one is scrolled rather than made too small to read."""
        wide = int.from_bytes(png[16:20]) > _WIDE  # as its header says
        self._blocks.append(self._render(_IMAGE, alt=alt, src=_data("image/png", png), wide=wide))

    def sounds(self, sounds: list[tuple[str, NDArray[np.float32], bytes | None]], sample_rate: int) -> None:
        """Add players side by side: caption, waveform `(S,)`, and a PNG or None for each."""
        figures = [
            self._render(
                _SOUND,
                caption=caption,
                sound=_sound(waveform, sample_rate),
                image=_data("image/png", png) if png else None,
            )
            for caption, waveform, png in sounds
        ]
        self._blocks.append(Markup('<div class="sounds">{}</div>').format(Markup("").join(figures)))

    def append(self, other: Report) -> None:
        """Add everything of another report."""
        self._blocks += other._blocks

    def _render(self, template: str, **values: object) -> Markup:
        return Markup(_templates.from_string(template).render(**values))

    def html(self) -> str:
        """Return the page."""
        return _templates.from_string(_PAGE).render(title=self.title, blocks=self._blocks)


def players(sounds: list[tuple[str, NDArray[np.float32], bytes]], sample_rate: int, note: str = "") -> str:
    """Return HTML for a notebook's cell: for each sound a caption, a player of its waveform `(S,)` and its PNG."""
    figures = [
        {
            "caption": caption,
            "image": _data("image/png", png),
            "sound": _data("audio/flac", flac(waveform, sample_rate)),
        }
        for caption, waveform, png in sounds
    ]
    return _templates.from_string(_PLAYERS).render(figures=figures, note=note)


def _sound(waveform: NDArray[np.float32], sample_rate: int) -> str:
    """Encode a waveform `(S,)` as MP3, or as FLAC where MP3 has no such sample rate."""
    if sample_rate in _MP3_RATES:
        return _data("audio/mpeg", mp3(waveform, sample_rate))
    return _data("audio/flac", flac(waveform, sample_rate))


def flac(waveform: NDArray[np.float32], sample_rate: int) -> bytes:
    """Encode a waveform `(S,)` of any sample rate as FLAC of 16 bits; samples beyond full scale are clipped."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def mp3(waveform: NDArray[np.float32], sample_rate: int) -> bytes:
    """Encode a waveform `(S,)` of one of MP3's sample rates; samples beyond full scale are clipped."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), sample_rate, format="MP3")
    return buffer.getvalue()


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
