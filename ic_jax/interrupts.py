"""Ctrl-C, so that it is neither lost nor in the way: ``cli.run`` is within ``kept``, writes of Orbax are ``deferred``."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it, a KeyboardInterrupt that Python drops comes again.

    Python prints and forgets what is raised in destructors and callbacks of the garbage collector; JAX has one of those.
    """
    before, dropped = sys.unraisablehook, []

    def again():
        time.sleep(0.05)  # the callback has returned by then; if not, this is only dropped once more
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        dropped.pop()

    def hook(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return before(unraisable)
        dropped.append(unraisable.exc_type)
        _thread.start_new_thread(again, ())  # threading.Thread would take locks, which a callback may be within

    sys.unraisablehook = hook
    try:
        yield
        while dropped:  # it came at the very end
            time.sleep(0.01)
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it, Ctrl-C waits until the end: an interrupted Orbax leaves threads behind that print tracebacks."""
    before, came = signal.getsignal(signal.SIGINT), []
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
