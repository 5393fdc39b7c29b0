"""From clip shards to a trained network.

From the ground up: `parallel`, `bags`, `training`, `practice`, `albums`, `finetuning`, `run`, `steps`,
`adapting`; apart from them `mixing`, for the U-Net, and `clips`, for networks of one's own. Import the files
themselves: what one step needs loads no other's libraries. `ClipDataset` and `GroupSampler` are here, too.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.learning.clips import ClipDataset, GroupSampler

__all__ = ["ClipDataset", "GroupSampler"]


if not TYPE_CHECKING:  # type checkers would believe any name

    def __getattr__(name: str) -> Any:
        """Import a name when it is first asked for."""
        if name in __all__:
            from avsep.learning import clips

            return getattr(clips, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
