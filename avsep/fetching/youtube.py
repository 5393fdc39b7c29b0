"""Videos of YouTube, the sources `youtube:ID`: a site, as `sources.SCHEMES` lists them."""

import re

SCHEME = "youtube"
NAME = "YouTube"
ID, ID_RULE = re.compile(r"[0-9A-Za-z_-]{11}"), "11 letters, digits, _ or -"
PAGE = "https://www.youtube.com/watch?v={}"
FILES: tuple[str, ...] = ("{}", "Y{}")  # AudioSet's tools put a Y in front
