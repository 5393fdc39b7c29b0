"""Drawn pictures of objects and sceneries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import scipy.interpolate
import scipy.signal
from numpy.random import Generator
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


# ----------------------------------------------------------------------------------- pictures


def draw(object_name: str | None, rng: Generator, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Draw one of OBJECTS somewhere in a random scene, or with None a scene without any, RGB.

    `size` is (width, height) in pixels. Place, scale, tilt, colours, make and background come
    from `rng`. Raises ValueError for a name that can't be drawn.
    """
    scenery = draw_scenery(rng, size)
    return compose(scenery, [] if object_name is None else [draw_sprite(object_name, rng)], rng)


def compose(scenery: Image.Image, sprites: Sequence[Image.Image], rng: Generator) -> Image.Image:
    """Put objects side by side into a scene; a single one fills most of it."""
    image, (width, height) = scenery.copy(), scenery.size
    for i, sprite in enumerate(sprites):
        share = width / len(sprites)
        side = int(min(height * rng.uniform(0.82, 1.12), share * rng.uniform(0.95, 1.15)))
        x = (i + 0.5) * share + rng.uniform(-0.5, 0.5) * max(0.15 * share, share - side)
        y = height / 2 + rng.uniform(-0.3, 0.7) * max(0.1 * height, 0.8 * (height - side))
        small = sprite.resize((side, side), Image.Resampling.BOX, reducing_gap=1.0)
        image.paste(small, (int(x - side / 2), int(y - side / 2)), small)
    return image


class _Pen:
    """Draws on a transparent square in unit coordinates, (0, 0) top left, turned about the middle."""

    def __init__(self, tilt_deg: float, mirrored: bool, side: int = 560) -> None:
        self.image = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self.image)
        self._side, self._mirror = side, -1 if mirrored else 1
        self._cos, self._sin = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))

    def _place(self, points: Sequence[Point]) -> list[Point]:
        x, y = (np.asarray(points, float) - 0.5).T
        placed = np.stack([self._mirror * (self._cos * x - self._sin * y), self._sin * x + self._cos * y], -1)
        return [(float(a), float(b)) for a, b in (placed + 0.5) * self._side]

    def shape(self, points: Sequence[Point], fill: Colour, edge: Colour | None = None, width: float = 0.008) -> None:
        self._draw.polygon(self._place(points), fill=fill)
        if edge is not None:
            self.line([*points, points[0]], edge, width)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        placed, thickness = self._place(points), max(1, round(width * self._side))
        self._draw.line(placed, fill=fill, width=thickness, joint="curve")
        if thickness > 3:
            r = thickness / 2 - 0.5
            for x, y in (placed[0], placed[-1]):
                self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        edge: Colour | None = None,
        width: float = 0.008,
        turn_deg: float = 0.0,
    ) -> None:
        self.shape(_arc(x, y, rx, ry, 0, 360, turn_deg), fill, edge, width)

    def ring(self, x: float, y: float, r: float, fill: Colour, width: float) -> None:
        self.line(_arc(x, y, r, r, 0, 365), fill, width)


def _arc(
    x: float, y: float, rx: float, ry: float, first_deg: float, last_deg: float, turn_deg: float = 0.0
) -> list[Point]:
    a, turn = np.radians(np.linspace(first_deg, last_deg, 49)), np.radians(turn_deg)
    u, v = rx * np.cos(a), ry * np.sin(a)
    px, py = x + np.cos(turn) * u - np.sin(turn) * v, y + np.sin(turn) * u + np.cos(turn) * v
    return list(zip(px.tolist(), py.tolist(), strict=True))


def _curve(points: Sequence[Point], n: int = 60) -> list[Point]:
    """Lead a smooth curve through points."""
    p = np.array(points)
    u = np.append(0, np.cumsum(np.hypot(*np.diff(p, axis=0).T)))
    at = np.linspace(0, u[-1], n)
    smooth = scipy.interpolate.PchipInterpolator(u, p)(at)
    return [(float(a), float(b)) for a, b in smooth]


def _mirrored(half: Sequence[Point], middle: float = 0.5) -> list[Point]:
    """Close an outline of which the right half is given, from top to bottom."""
    return [*half, *((2 * middle - x, y) for x, y in reversed(half))]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten a colour."""
    r, g, b = (c * factor if factor <= 1 else 255 - (255 - c) * max(0, 2 - factor) for c in colour)
    return int(r), int(g), int(b)


def _pick(rng: Generator, *colours: Colour, spread: int = 14) -> Colour:
    chosen = np.array(colours[rng.integers(len(colours))])
    r, g, b = (int(c) for c in np.clip(chosen + rng.integers(-spread, spread + 1, 3), 0, 255))
    return r, g, b


_BLACK, _DARK, _STEEL, _SILVER = (18, 16, 16), (48, 42, 40), (128, 132, 142), (208, 212, 220)
_BRASS, _IVORY, _HAIR = (206, 166, 74), (238, 230, 210), (240, 238, 228)


def draw_sprite(object_name: str, rng: Generator) -> Image.Image:
    """Draw one object alone on a transparent square, RGBA, larger than it will be shown."""
    if object_name not in DRAWERS:
        raise ValueError(f"{object_name!r} can't be drawn; {', '.join(DRAWERS)} can")
    draw, middle_deg, spread_deg = DRAWERS[object_name]
    pen = _Pen(middle_deg + rng.uniform(-spread_deg, spread_deg), rng.random() < 0.5)
    draw(pen, rng)
    return pen.image


# fmt: off
def _draw_guitar(pen: _Pen, rng: Generator) -> None:
    top = _pick(rng, (226, 178, 104), (204, 134, 62), (236, 208, 150), (164, 84, 42), (70, 48, 40))
    edge, neck = _shade(top, 0.42), _pick(rng, (92, 58, 34), (64, 40, 28))
    waist, lower = rng.uniform(0.112, 0.128), rng.uniform(0.195, 0.215)
    half = [(0.5, 0.47), (0.56, 0.475), (0.635, 0.515), (0.65, 0.57), (0.5 + waist, 0.665),
            (0.5 + lower * 0.88, 0.745), (0.5 + lower, 0.83), (0.5 + lower * 0.86, 0.92), (0.58, 0.965),
            (0.5, 0.97)]
    body = _mirrored(_curve(half))
    pen.shape(body, top, edge, 0.016)
    pen.shape([(0.5 + 0.93 * (x - 0.5), 0.72 + 0.945 * (y - 0.72)) for x, y in body], _shade(top, 1.12))
    hole = 0.655
    pen.oval(0.5, hole, 0.072, 0.072, _shade(top, 0.6))
    pen.oval(0.5, hole, 0.057, 0.057, _BLACK)
    if rng.random() < 0.5:
        pen.shape([(0.555, 0.63), (0.60, 0.65), (0.595, 0.76), (0.54, 0.72)], _DARK)
    pen.shape([(0.475, 0.13), (0.525, 0.13), (0.533, 0.60), (0.467, 0.60)], neck, _BLACK, 0.006)
    for fret in range(1, 13):
        y = 0.13 + 0.62 * (1 - 2 ** (-fret / 12))
        pen.line([(0.475 - 0.008 * (y - 0.13), y), (0.525 + 0.008 * (y - 0.13), y)], _SILVER, 0.005)
        if fret in (3, 5, 7, 9):
            pen.oval(0.5, y - 0.012, 0.006, 0.006, _IVORY)
    pen.shape([(0.475, 0.13), (0.455, 0.03), (0.545, 0.03), (0.525, 0.13)], _shade(neck, 0.8), _BLACK, 0.006)
    for i in range(3):
        for sign in (-1, 1):
            y = 0.045 + 0.03 * i
            pen.line([(0.5 + sign * 0.04, y), (0.5 + sign * 0.062, y)], _SILVER, 0.008)
            pen.oval(0.5 + sign * 0.068, y, 0.011, 0.008, _IVORY, _STEEL, 0.004)
    pen.shape(_box(0.40, 0.84, 0.60, 0.868), _shade(neck, 0.7))
    pen.line([(0.45, 0.85), (0.55, 0.85)], _IVORY, 0.007)
    for i in range(6):
        offset = (i - 2.5) / 2.5
        pen.line([(0.5 + 0.018 * offset, 0.12), (0.5 + 0.036 * offset, 0.85)], _HAIR, 0.003)


def _draw_violin(pen: _Pen, rng: Generator) -> None:
    top = _pick(rng, (172, 82, 34), (146, 60, 26), (190, 104, 44), (120, 46, 28), (206, 126, 58))
    edge = _shade(top, 0.4)
    half = [(0.5, 0.405), (0.545, 0.412), (0.598, 0.45), (0.613, 0.50), (0.606, 0.553), (0.622, 0.578)]
    bout = [(0.622, 0.578), (0.585, 0.60), (0.568, 0.645), (0.58, 0.69), (0.632, 0.722)]
    low = [(0.632, 0.722), (0.622, 0.745), (0.647, 0.80), (0.648, 0.85), (0.61, 0.92), (0.55, 0.947),
           (0.5, 0.95)]
    body = _mirrored([*_curve(half, 30), *_curve(bout, 30), *_curve(low, 40)])
    pen.shape(body, top, edge, 0.014)
    pen.shape([(0.5 + 0.9 * (x - 0.5), 0.68 + 0.94 * (y - 0.68)) for x, y in body], _shade(top, 1.15))
    for sign in (-1, 1):
        hole = [(0.542, 0.618), (0.556, 0.61), (0.563, 0.63), (0.558, 0.67), (0.566, 0.71), (0.58, 0.725),
                (0.588, 0.708)]
        pen.line([(0.5 + sign * (x - 0.5), y) for x, y in _curve(hole, 24)], _BLACK, 0.010)
        pen.oval(0.5 + sign * 0.045, 0.621, 0.008, 0.008, _BLACK)
        pen.oval(0.5 + sign * 0.085, 0.706, 0.009, 0.009, _BLACK)
    pen.shape([(0.484, 0.14), (0.516, 0.14), (0.527, 0.60), (0.473, 0.60)], _BLACK)
    pen.shape([(0.482, 0.13), (0.486, 0.07), (0.514, 0.07), (0.518, 0.14)], top, edge, 0.006)
    pen.oval(0.5, 0.055, 0.026, 0.026, top, edge, 0.007)
    pen.line(_arc(0.5, 0.055, 0.012, 0.012, 0, 300), edge, 0.006)
    for i, sign in enumerate((-1, 1, -1, 1)):
        y = 0.08 + 0.015 * i
        pen.line([(0.5, y), (0.5 + sign * 0.048, y - 0.006)], _BLACK, 0.009)
        pen.oval(0.5 + sign * 0.055, y - 0.007, 0.011, 0.008, _BLACK)
    pen.shape([(0.47, 0.765), (0.53, 0.765), (0.513, 0.925), (0.487, 0.925)], _BLACK)
    pen.oval(0.425, 0.885, 0.062, 0.045, _BLACK, (60, 56, 56), 0.005, -25)
    pen.line([(0.462, 0.682), (0.5, 0.67), (0.538, 0.682)], _IVORY, 0.014)
    for i in range(4):
        offset = (i - 1.5) / 1.5
        pen.line([(0.5 + 0.010 * offset, 0.13), (0.5 + 0.022 * offset, 0.675)], _HAIR, 0.0035)
        pen.line([(0.5 + 0.022 * offset, 0.675), (0.5 + 0.018 * offset, 0.78)], _HAIR, 0.0035)
    wood, shift = _pick(rng, (104, 52, 24), (70, 36, 22)), rng.uniform(-0.03, 0.03)
    if rng.random() < 0.5:  # the bow lies across the strings, or beside the violin
        tip, frog = (0.12, 0.50 + shift), (0.93, 0.75 + shift)
    else:
        tip, frog = (0.70 + shift, 0.06), (0.80 + shift, 0.93)
    along = np.subtract(frog, tip) / np.hypot(*np.subtract(frog, tip))
    across = np.array([-along[1], along[0]]) * 0.026
    hair = [tuple(np.add(tip, across)), tuple(np.add(frog, across) - 0.06 * along)]
    pen.line(hair, _HAIR, 0.010)
    pen.line(_curve([tip, tuple(np.add(tip, frog) / 2 + 0.25 * across), frog]), wood, 0.013)
    pen.line([tip, hair[0]], _IVORY, 0.010)
    pen.line([hair[1], tuple(np.subtract(frog, 0.05 * along))], _BLACK, 0.022)


def _draw_flute(pen: _Pen, rng: Generator) -> None:
    tube = _pick(rng, _SILVER, (196, 202, 214), _SILVER, (222, 196, 128), (120, 78, 52), spread=8)
    y, r = 0.5, rng.uniform(0.026, 0.032)
    for i, factor in enumerate((0.45, 0.72, 0.92, 1.1, 1.6, 1.2, 0.95, 0.7, 0.5)):  # light along the tube
        stripe = y - r + 2 * r * i / 9
        pen.shape(_box(0.02, stripe, 0.98, stripe + 2 * r / 9 + 0.002), _shade(tube, factor))
    for x, half in ((0.02, 0.012), (0.31, 0.014), (0.79, 0.012), (0.972, 0.008)):
        joint = _box(x - half, y - 1.25 * r, x + half, y + 1.25 * r)
        pen.shape(joint, _shade(tube, 1.3), _shade(tube, 0.4), 0.004)
    pen.oval(0.175, y - 0.25 * r, 0.062, 1.35 * r, _shade(tube, 1.35), _shade(tube, 0.4), 0.005)
    pen.oval(0.175, y - 0.3 * r, 0.017, 0.42 * r, _BLACK)
    metal = _shade(tube, 1.25) if sum(tube) > 330 else _SILVER
    pen.line([(0.36, y - 1.35 * r), (0.77, y - 1.35 * r)], _shade(metal, 0.55), 0.010)
    pen.line([(0.82, y - 1.35 * r), (0.95, y - 1.35 * r)], _shade(metal, 0.55), 0.010)
    for x in (0.37, 0.41, 0.45, 0.49, 0.545, 0.585, 0.625, 0.665, 0.705, 0.745, 0.83, 0.87, 0.915):
        key = 0.019 if x not in (0.37, 0.41) else 0.014
        pen.line([(x, y - 1.45 * r), (x, y)], _shade(metal, 0.7), 0.010)
        pen.oval(x, y - 0.25 * r, key, 1.05 * key, metal, _shade(metal, 0.4), 0.005)
        pen.oval(x - 0.003, y - 0.25 * r - 0.004, 0.4 * key, 0.4 * key, _shade(metal, 1.7))
    for x in (0.39, 0.53, 0.80):
        pen.line([(x, y + 0.9 * r), (x + 0.035, y + 1.9 * r)], _shade(metal, 0.8), 0.014)


def _draw_drum(pen: _Pen, rng: Generator) -> None:
    shell = _pick(rng, (178, 30, 36), (28, 62, 150), (20, 120, 80), (40, 38, 42), (206, 150, 60))
    rim, head = _pick(rng, _SILVER, _BRASS, _SILVER), _pick(rng, (244, 240, 230), (250, 248, 244), spread=5)
    rx, ry, top, bottom = 0.37, rng.uniform(0.10, 0.14), 0.42, rng.uniform(0.70, 0.82)

    def side(y0: float, y1: float, radius: float) -> list[Point]:
        return [*_arc(0.5, y1, radius, ry, 0, 180), *reversed(_arc(0.5, y0, radius, ry, 0, 180))]

    pen.shape(side(top, bottom, rx), shell, _shade(shell, 0.4), 0.01)
    for angle, factor in ((150, 1.25), (130, 1.15), (40, 0.75), (22, 0.6)):
        x0, x1 = (0.5 + rx * np.cos(np.radians(a)) for a in (angle + 9, angle - 9))
        y0, y1 = (ry * np.sin(np.radians(a)) for a in (angle + 9, angle - 9))
        stripe = [(x0, top + y0), (x1, top + y1), (x1, bottom + y1), (x0, bottom + y0)]
        pen.shape(stripe, _shade(shell, factor))
    ropes = rng.random() < 0.5
    angles = np.radians(np.linspace(12, 168, 8))
    for i, a in enumerate(angles):
        x, y = 0.5 + rx * np.cos(a), ry * np.sin(a)
        if ropes and i + 1 < len(angles):
            x2, y2 = 0.5 + rx * np.cos(angles[i + 1]), ry * np.sin(angles[i + 1])
            middle = ((x + x2) / 2, bottom + (y + y2) / 2)
            pen.line([(x, top + y), middle, (x2, top + y2)], _HAIR, 0.011)
        elif not ropes and i % 2:
            pen.line([(x, top + y + 0.02), (x, bottom + y - 0.01)], rim, 0.010)
            middle_y = (top + bottom) / 2 + y
            pen.shape(_box(x - 0.014, middle_y - 0.035, x + 0.014, middle_y + 0.035), rim)
    for y in (bottom - 0.035, top):
        pen.shape(side(y, y + 0.05, rx + 0.012), rim, _shade(rim, 0.45), 0.006)
    pen.oval(0.5, top, rx + 0.012, ry + 0.008, rim, _shade(rim, 0.45), 0.008)
    pen.oval(0.5, top, rx - 0.012, ry - 0.010, head, _shade(head, 0.75), 0.006)
    wood = _pick(rng, (214, 170, 106), (184, 130, 74))
    reach = rng.uniform(-0.05, 0.05)
    for sign in (-1, 1):
        tip = (0.5 + sign * (0.06 + reach), top - 0.01 + 0.02 * sign)
        end = (0.5 + sign * 0.40, 0.07 + 0.05 * reach)
        pen.line([tip, end], _shade(wood, 0.5), 0.030)
        pen.line([tip, end], wood, 0.022)
        pen.oval(*tip, 0.024, 0.017, wood, _shade(wood, 0.5), 0.005)


def _draw_dog(pen: _Pen, rng: Generator) -> None:
    coat = _pick(rng, (196, 146, 88), (120, 78, 48), (232, 214, 184), (70, 62, 60), (150, 142, 138), spread=8)
    light, dark = _shade(coat, 1.5), _shade(coat, 0.6)
    edge, patch = _shade(coat, 0.4), _shade(coat, 0.45) if rng.random() < 0.5 else light
    pen.line(_curve([(0.66, 0.86), (0.80, 0.80), (0.86, 0.66), (0.84, rng.uniform(0.52, 0.62))]), edge, 0.066)
    pen.line(_curve([(0.66, 0.86), (0.80, 0.80), (0.86, 0.66), (0.84, 0.6)]), coat, 0.050)
    pen.oval(0.5, 0.76, 0.21, 0.21, coat, edge)
    for sign in (-1, 1):
        pen.oval(0.5 + sign * 0.19, 0.87, 0.085, 0.10, coat, edge)
        pen.oval(0.5 + sign * 0.20, 0.955, 0.085, 0.034, light, edge)
    pen.oval(0.5, 0.76, 0.11, 0.17, light)
    for sign in (-1, 1):
        pen.shape(_curve([(0.5 + sign * 0.02, 0.66), (0.5 + sign * 0.105, 0.66), (0.5 + sign * 0.10, 0.95),
                          (0.5 + sign * 0.015, 0.95), (0.5 + sign * 0.02, 0.66)]), coat, edge)
        pen.oval(0.5 + sign * 0.065, 0.955, 0.065, 0.034, light, edge)
    collar = _pick(rng, (200, 40, 40), (40, 90, 190), (40, 150, 90))
    pen.line(_arc(0.5, 0.50, 0.16, 0.15, 25, 155), collar, 0.036)
    floppy = rng.random() < 0.85
    if not floppy:
        for sign in (-1, 1):
            x = [0.5 + sign * d for d in (0.06, 0.20, 0.235, 0.07, 0.17, 0.20)]
            pen.shape([(x[0], 0.19), (x[1], 0.02), (x[2], 0.28)], dark, edge)
            pen.shape([(x[3] + sign * 0.04, 0.18), (x[4] + sign * 0.02, 0.07), (x[5], 0.25)], (214, 150, 144))
    pen.oval(0.5, 0.34, 0.215, 0.20, coat, edge)
    if rng.random() < 0.6:
        pen.oval(0.585, 0.29, 0.085, 0.10, patch)
    else:
        pen.shape(_curve([(0.47, 0.15), (0.53, 0.15), (0.525, 0.3), (0.475, 0.3), (0.47, 0.15)]), light)
    if floppy:
        for sign in (-1, 1):
            ear = [(0.12, 0.15), (0.22, 0.14), (0.285, 0.27), (0.275, 0.42), (0.225, 0.46), (0.185, 0.36),
                   (0.12, 0.15)]
            pen.shape(_curve([(0.5 + sign * a, b) for a, b in ear]), dark, edge)
    barking = rng.random() < 0.6
    if barking:
        pen.oval(0.5, 0.50, 0.075, 0.065, (70, 20, 26), edge)
        pen.oval(0.5, 0.525, 0.045, 0.040, (226, 104, 116))
    for sign in (-1, 1):
        pen.oval(0.5 + sign * 0.052, 0.435, 0.075, 0.062, light, edge, 0.006)
    pen.shape(_box(0.44, 0.37, 0.56, 0.43), light)
    pen.oval(0.5, 0.37, 0.075, 0.045, light)
    pen.oval(0.5, 0.385, 0.050, 0.034, _BLACK)
    pen.oval(0.485, 0.373, 0.014, 0.008, (150, 150, 156))
    pen.line([(0.5, 0.41), (0.5, 0.455)], _BLACK, 0.008)
    for sign in (-1, 1):
        pen.line(_arc(0.5 + sign * 0.035, 0.452, 0.035, 0.024, 10, 170), _BLACK, 0.008)
        pen.oval(0.5 + sign * 0.085, 0.285, 0.034, 0.038, (250, 250, 246), edge, 0.005)
        pen.oval(0.5 + sign * 0.082, 0.290, 0.024, 0.028, (60, 36, 20))
        pen.oval(0.5 + sign * 0.082 - 0.008, 0.280, 0.008, 0.009, (255, 255, 255))


def _draw_motorcycle(pen: _Pen, rng: Generator) -> None:
    paint = _pick(rng, (190, 24, 30), (24, 70, 170), (30, 30, 34), (230, 120, 20), (230, 200, 40))
    rear, front, y, r = 0.20, 0.80, 0.70, rng.uniform(0.150, 0.165)
    for x in (rear, front):
        pen.ring(x, y, r, _BLACK, 0.048)
        pen.ring(x, y, r - 0.034, _SILVER, 0.012)
        for a in np.arange(0, 180, 22.5) + rng.uniform(0, 22):
            pen.line(_arc(x, y, r - 0.03, r - 0.03, float(a), float(a) + 180)[:: 48], _STEEL, 0.005)
        pen.oval(x, y, 0.038, 0.038, _STEEL, _DARK)
    pen.line(_arc(rear, y, r + 0.034, r + 0.034, 190, 320), paint, 0.026)  # mudguards
    pen.line(_arc(front, y, r + 0.034, r + 0.034, 215, 330), paint, 0.026)
    pen.line([(rear, y), (0.36, 0.55), (0.42, 0.50)], _DARK, 0.026)
    pen.line([(rear, y), (0.45, 0.72), (0.60, 0.72), (0.655, 0.44)], _DARK, 0.024)
    pen.line([(front, y), (0.665, 0.34)], _SILVER, 0.034)  # fork
    pen.line([(front + 0.004, y - 0.02), (0.73, 0.50)], _STEEL, 0.044)
    pen.oval(0.50, 0.68, 0.085, 0.065, _STEEL, _DARK)
    pen.oval(0.50, 0.68, 0.045, 0.036, _SILVER, _DARK, 0.006)
    cylinders = ((0.43, 0.47), (0.57, 0.53)) if rng.random() < 0.5 else ((0.5, 0.5),)
    for x0, x1 in cylinders:
        for i in range(6):
            a = i / 5
            x, fin = x1 + (x0 - x1) * (1 - a) * 0.8 + (x0 - x1) * 0.1, 0.62 - 0.095 * (1 - a)
            pen.line([(x - 0.045, fin), (x + 0.045, fin)], _SILVER if i % 2 else _STEEL, 0.013)
    pipe = [(0.565, 0.60), (0.62, 0.68), (0.56, 0.775), (0.42, 0.79), (0.30, 0.785)]
    pen.line(_curve(pipe), _SILVER, 0.026)
    pen.line([(0.34, 0.787), (0.06, 0.765)], _shade(_SILVER, 0.55), 0.060)  # exhaust
    pen.line([(0.34, 0.781), (0.07, 0.759)], _SILVER, 0.036)
    tank = [(0.40, 0.50), (0.415, 0.435), (0.48, 0.395), (0.57, 0.39), (0.64, 0.42), (0.66, 0.46),
            (0.56, 0.505), (0.40, 0.50)]
    pen.shape(_curve(tank), paint, _shade(paint, 0.4), 0.009)
    pen.line(_curve([(0.46, 0.43), (0.53, 0.412), (0.60, 0.425)]), _shade(paint, 1.6), 0.012)
    seat = [(0.13, 0.475), (0.20, 0.465), (0.28, 0.485), (0.36, 0.49), (0.42, 0.465), (0.43, 0.51),
            (0.30, 0.54), (0.15, 0.51)]
    pen.shape([*seat, seat[0]], (58, 40, 32) if rng.random() < 0.4 else _BLACK, _DARK)
    pen.shape([(0.27, 0.545), (0.41, 0.515), (0.40, 0.60), (0.31, 0.62)], paint, _shade(paint, 0.4), 0.006)
    pen.line(_curve([(0.665, 0.36), (0.655, 0.30), (0.60, 0.275), (0.53, 0.30)]), _STEEL, 0.020)  # handlebar
    pen.line([(0.57, 0.283), (0.52, 0.302)], _BLACK, 0.032)
    pen.line([(0.645, 0.30), (0.63, 0.215)], _STEEL, 0.010)
    pen.oval(0.628, 0.205, 0.030, 0.020, _DARK)
    pen.oval(0.705, 0.385, 0.050, 0.055, _shade(_SILVER, 0.7), _DARK)
    pen.oval(0.725, 0.385, 0.024, 0.046, (255, 246, 200), _STEEL, 0.006)
    pen.oval(0.105, 0.535, 0.020, 0.020, (220, 40, 40), _DARK, 0.005)
# fmt: on


DRAWERS: dict[str, tuple[Callable[[_Pen, Generator], None], float, float]] = {  # and tilts: middle, spread
    "acoustic_guitar": (_draw_guitar, 35, 22),
    "violin": (_draw_violin, 20, 20),
    "flute": (_draw_flute, -14, 16),
    "drum": (_draw_drum, 0, 9),
    "dog": (_draw_dog, 0, 8),
    "motorcycle": (_draw_motorcycle, 0, 6),
}


class _Canvas:
    """Draws a scene's ground, walls and skies, in pixels, `(0, 0)` top left."""

    def __init__(self, size: tuple[int, int], floor: float) -> None:
        self.image = Image.new("RGB", size)
        self.width, self.height = size
        self.floor = floor  # where the ground begins
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.draw.rectangle((left, top, right, bottom), fill=fill)

    def gradient(self, top: float, bottom: float, first: Colour, last: Colour) -> None:
        for row in range(int(top), int(bottom) + 1):
            a = (row - top) / max(1, bottom - top)
            mixed = [int(p + a * (q - p)) for p, q in zip(first, last, strict=True)]
            self.draw.line((0, row, self.width, row), fill=(mixed[0], mixed[1], mixed[2]))


def draw_scenery(rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Draw a room, a stage, a street or a park without any of the objects."""
    canvas = _Canvas(size, floor=size[1] * rng.uniform(0.62, 0.8))
    _PLACES[rng.choice(list(_PLACES))](canvas, rng)
    return canvas.image


def _draw_room(c: _Canvas, rng: Generator) -> None:
    wall = _pick(rng, (206, 196, 178), (170, 190, 200), (196, 176, 190), (180, 200, 170), (120, 130, 150))
    c.gradient(0, c.floor, _shade(wall, 1.15), wall)
    c.gradient(c.floor, c.height, _pick(rng, (150, 104, 66), (120, 110, 104), (96, 70, 56)), (60, 46, 40))
    c.box(0, c.floor - 5, c.width, c.floor, _shade(wall, 0.7))
    x, y = rng.uniform(0, 0.7) * c.width, rng.uniform(0.05, 0.2) * c.height
    right, bottom = x + 0.25 * c.width, y + 0.3 * c.height
    c.box(x - 4, y - 4, right + 4, bottom + 4, (236, 232, 224))
    c.box(x, y, right, bottom, _pick(rng, (150, 196, 230), (60, 76, 110), (226, 200, 150)))
    if rng.random() < 0.6:
        c.box(x + 0.12 * c.width, y, x + 0.13 * c.width, bottom, (236, 232, 224))


def _draw_stage(c: _Canvas, rng: Generator) -> None:
    curtain = _pick(rng, (110, 16, 24), (30, 30, 80), (60, 20, 70), (24, 60, 56))
    for left in range(0, c.width, 4):
        fold = 0.75 + 0.25 * np.sin(left * 0.14 + 6 * rng.random())
        c.box(left, 0, left + 4, c.floor, _shade(curtain, fold))
    c.gradient(c.floor, c.height, _pick(rng, (120, 84, 54), (70, 66, 70)), (30, 24, 22))
    light = Image.new("L", c.image.size)
    x = rng.uniform(0.3, 0.7) * c.width
    beam = [(x, -20), (x - 0.35 * c.width, c.height), (x + 0.35 * c.width, c.height)]
    ImageDraw.Draw(light).polygon(beam, fill=46)
    c.image.paste((255, 244, 214), (0, 0), light)


def _draw_street(c: _Canvas, rng: Generator) -> None:
    c.gradient(0, c.floor, _pick(rng, (120, 170, 220), (170, 176, 186), (240, 190, 150)), (226, 226, 220))
    x = -20.0
    while x < c.width:
        across, tall = rng.uniform(40, 90), rng.uniform(0.3, 0.95) * c.floor
        wall = _pick(rng, (150, 120, 104), (130, 134, 140), (176, 150, 120), (110, 96, 100))
        c.box(x, c.floor - tall, x + across, c.floor, wall)
        for wx in np.arange(x + 7, x + across - 12, 16):
            for wy in np.arange(c.floor - tall + 8, c.floor - 18, 22):
                c.box(wx, wy, wx + 8, wy + 12, _shade(wall, 0.6 if rng.random() < 0.7 else 1.7))
        x += across + rng.uniform(0, 12)
    c.gradient(c.floor, c.height, (110, 110, 114), (70, 70, 76))
    for x in np.arange(rng.uniform(-40, 0), c.width, 60):
        c.box(x, 0.93 * c.height, x + 30, 0.93 * c.height + 4, (226, 220, 200))


def _draw_park(c: _Canvas, rng: Generator) -> None:
    c.gradient(0, c.floor, _pick(rng, (110, 170, 230), (150, 190, 220), (230, 180, 150)), (220, 234, 240))
    c.gradient(c.floor, c.height, _pick(rng, (96, 150, 70), (130, 160, 80), (150, 140, 90)), (60, 104, 48))
    for _ in range(rng.integers(2, 6)):
        x, r = rng.uniform(0, c.width), rng.uniform(18, 42)
        leaves = _pick(rng, (50, 110, 56), (80, 130, 60), (160, 110, 50))
        c.box(x - 4, c.floor - 1.4 * r, x + 4, c.floor + 4, (92, 64, 44))
        c.draw.ellipse((x - r, c.floor - 3 * r, x + r, c.floor - r), fill=leaves)
        crown = (x - 0.8 * r, c.floor - 3.3 * r, x + 0.4 * r, c.floor - 2 * r)
        c.draw.ellipse(crown, fill=_shade(leaves, 1.15))


_PLACES = {"room": _draw_room, "stage": _draw_stage, "street": _draw_street, "park": _draw_park}
