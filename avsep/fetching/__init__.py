"""From a segment's remote source to an excerpt in the media store, within a budget.

From the ground up: `egress` (the budget), `options`, `answers` (what yt-dlp's messages mean), `sources`,
`ytdlp`, `fetch`, `store`.
"""

from avsep.fetching.egress import (
    EgressBudget,
    EgressIdentity,
    IdentityStatus,
    Lease,
    Stop,
    TokenBucket,
    Wait,
    identities,
)
from avsep.fetching.options import Budget, FetchOptions, FetchResult, Stopped
from avsep.fetching.answers import classify
from avsep.fetching.sources import find_media, is_remote, several_of, store_path, within
from avsep.fetching.ytdlp import check_tools
from avsep.fetching.fetch import download, fetch
from avsep.fetching.store import MediaStore, open_store

__all__ = [
    "Budget",
    "EgressBudget",
    "EgressIdentity",
    "FetchOptions",
    "FetchResult",
    "IdentityStatus",
    "Lease",
    "MediaStore",
    "Stop",
    "Stopped",
    "TokenBucket",
    "Wait",
    "check_tools",
    "classify",
    "download",
    "fetch",
    "find_media",
    "identities",
    "is_remote",
    "open_store",
    "several_of",
    "store_path",
    "within",
]
