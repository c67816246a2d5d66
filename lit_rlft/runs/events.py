"""The event file of TensorBoard, on a disk that may take no more."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lit_rlft.runs.files import disk_trouble

__all__ = ["quiet_event_writer"]


@contextmanager
def quiet_event_writer() -> Iterator[None]:
    """Keep TensorBoard's writing thread from printing that its disk takes no more.

    The thread writes late. It keeps its error, which the next event then raises in the run itself.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        writer = type(args.thread).__name__ == "_AsyncWriterThread"
        error = args.exc_value
        if writer and error is not None and disk_trouble(error, "", "") is not None:
            return
        before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
