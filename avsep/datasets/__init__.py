"""The tables of public sets, MUSIC, AVE and VGGSound, to segments with each set's own vocabulary.

A row names a video and a label. A label is what can be heard and seen there, so it gives both `objects` and `labels`.
From the ground up: `labels`, `rows`, `segments`.
"""

from avsep.datasets.labels import name_of, objects_of, vocabulary, vocabulary_of
from avsep.datasets.rows import EXCERPT_S, MUSIC_STARTS_S, MUSIC_TEST_PERCENT, Row, ave_rows, music_rows, vggsound_rows
from avsep.datasets.segments import PLANS, plan_ave, plan_music, plan_vggsound, to_segments

__all__ = [
    "EXCERPT_S",
    "MUSIC_STARTS_S",
    "MUSIC_TEST_PERCENT",
    "PLANS",
    "Row",
    "ave_rows",
    "music_rows",
    "name_of",
    "objects_of",
    "plan_ave",
    "plan_music",
    "plan_vggsound",
    "to_segments",
    "vggsound_rows",
    "vocabulary",
    "vocabulary_of",
]
