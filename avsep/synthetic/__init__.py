"""Clips with known sources: synthesised sounds, drawn pictures, scenes of both, planted bases."""

from avsep.synthetic.sounds import OBJECTS, OFFSCREEN, performance
from avsep.synthetic.drawings import draw
from avsep.synthetic.scenes import SceneConfig, images, plan_scene, render_scene, write_scene, write_table
from avsep.synthetic.planted import planted_bases
from avsep.synthetic.labeller import train_small_labeller

__all__ = [
    "OBJECTS",
    "OFFSCREEN",
    "SceneConfig",
    "draw",
    "images",
    "performance",
    "plan_scene",
    "planted_bases",
    "render_scene",
    "train_small_labeller",
    "write_scene",
    "write_table",
]
