"""Ctrl-C while a plan is sought: a solver takes it as the end of its search, and answers with its best plan until then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The Ctrl-C seen meanwhile. Each still raises KeyboardInterrupt; a program that ignores or handles Ctrl-C itself
    goes on doing so."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    on_main = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interruptible(progress: Callable[[str], None] | None = None) -> Iterator[Callable[[str], None]]:
    """Planning inside a step, which Ctrl-C ends altogether. Yields what solvers are to tell their progress to: after an
    interrupt it ends every later search at its first word. Raises KeyboardInterrupt where a solver took it as an end."""
    with interrupts() as seen:

        def say(text: str) -> None:
            if seen:
                raise KeyboardInterrupt
            if progress is not None:
                progress(text)

        yield say
        if seen:
            raise KeyboardInterrupt
