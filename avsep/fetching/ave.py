"""The excerpts of the set AVE, the sources `ave:ID`: its tables don't say where in a video of YouTube they begin."""

import re

SCHEME = "ave"
NAME = "AVE"
ID, ID_RULE = re.compile(r"[0-9A-Za-z_-]+"), "letters, digits, _ or -"
PAGE = ""  # people hold these files
FILES: tuple[str, ...] = ("{}",)
