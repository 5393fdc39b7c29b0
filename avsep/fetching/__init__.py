"""From a segment's remote source to an excerpt in the media store, within a budget.

From the ground up: `egress` (the budget), `options`, `answers` (what yt-dlp's messages mean), `sources`,
`ytdlp`, `fetch`.
"""

from avsep.fetching.egress import EgressBudget, EgressIdentity, IdentityStatus, Lease, TokenBucket, identities
from avsep.fetching.options import Budget, FetchOptions, FetchResult
from avsep.fetching.answers import classify
from avsep.fetching.sources import find_media, is_remote, store_path, within
from avsep.fetching.ytdlp import check_tools
from avsep.fetching.fetch import download, fetch

__all__ = [
    "Budget",
    "EgressBudget",
    "EgressIdentity",
    "FetchOptions",
    "FetchResult",
    "IdentityStatus",
    "Lease",
    "TokenBucket",
    "check_tools",
    "classify",
    "download",
    "fetch",
    "find_media",
    "identities",
    "is_remote",
    "store_path",
    "within",
]
