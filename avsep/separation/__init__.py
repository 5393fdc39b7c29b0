"""From a sound to one waveform per object, and the rest: masks, windows, what a separator is, and the trained one."""

from avsep.objects import REST
from avsep.separation.assigned import Assigned, EditedPlan, assignments
from avsep.separation.masks import at_least, basis_shares, ratio_masks, separate
from avsep.separation.separates import Planned, Separates, Separation, Whole, render_whole
from avsep.separation.trained import Plan, Separator
from avsep.separation.windows import Explanation, Window, resample

__all__ = [
    "REST",
    "Assigned",
    "EditedPlan",
    "Explanation",
    "Plan",
    "Planned",
    "Separates",
    "Separation",
    "Separator",
    "Whole",
    "Window",
    "assignments",
    "at_least",
    "basis_shares",
    "ratio_masks",
    "render_whole",
    "resample",
    "separate",
]
