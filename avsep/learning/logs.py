"""A training's figures to TensorBoard."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from avsep import storage


class TensorBoard:
    """Write a training's rows, those of `history.json`, for TensorBoard: a scalar per figure, a step per row.

    `train_loss` becomes `train/loss`, `val_map` `val/map`. A training that goes on gives its rows from the first one;
    TensorBoard then shows these in place of what the folder has had from earlier trainings.

    Args:
        folder: a folder or URI. In an object store the file of events is written anew with every row.

    Raises OSError where nothing can be written there.
    """

    def __init__(self, folder: storage.AnyPath) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # takes a second
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder = storage.resolve(os.fspath(folder), ".")
        storage.make_directory(self._folder)
        self._copied = tempfile.TemporaryDirectory() if storage.is_uri(self._folder) else None
        self._here = self._copied.name if self._copied else self._folder
        # not SummaryWriter, which writes in a thread: what is flushed may come later, and errors never
        self._writer = EventsWriter(os.path.join(self._here, "events"), f".{os.getpid()}")
        self._n_rows = 0
        self._write(session_log=SessionLog(status=SessionLog.START))  # what earlier ones say from step 0 on is void
        self._flush()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write one row; when it returns, the row can be read."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = []
        for name, value in row.items():
            if name == "epoch" or not isinstance(value, (int, float)):
                continue
            split, _, figure = name.partition("_")
            tag = f"{split}/{figure}" if split in ("train", "val") else name
            values.append(Summary.Value(tag=tag, simple_value=value))
        self._write(summary=Summary(value=values))
        self._n_rows += 1
        self._flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
        if self._copied:
            self._copied.cleanup()

    def _write(self, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=self._n_rows, **what))

    def _flush(self) -> None:
        self._writer.flush()
        if self._copied:
            for path in storage.list_files(self._here):
                storage.write_bytes(storage.join(self._folder, storage.name(path)), storage.read_bytes(path))
