"""Signals: the first SIGTERM or SIGINT saves and ends a run, the second kills it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_listening: list[Signals] = []


class Interrupted(SystemExit):
    """Raised when a signal has ended a run, after everything was saved.

    If it is not caught, the process ends with the exit code that is usual for the
    signal: 143 for SIGTERM, 130 for SIGINT (Ctrl-C).
    """

    def __init__(self, number: int, message: str) -> None:
        """Computes the exit code from the number of the signal."""
        super().__init__(128 + number)
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


class Cut(BaseException):
    """Ends work that may be cut short; it never leaves :func:`jlstm.train.fit`."""


class Signals:
    """A context manager that listens for signals, in the main thread only.

    Attributes:
      received: the number of the first signal; None before it.
      doing: what the run is doing at the moment, for the message on a signal.
    """

    def __init__(self, *, listen: bool, forward: bool = False) -> None:
        self.received: int | None = None
        self.doing = "starting"
        self._doing_then: str | None = None
        self._listen = listen and threading.current_thread() is threading.main_thread()
        self._forward = forward and (
            threading.current_thread() is threading.main_thread()
        )
        self._may_cut = False
        self._old: dict[int, Any] = {}
        self._old_fd = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._count = 0

    def __enter__(self) -> Signals:
        if self._forward:
            # JAX takes note of SIGTERM itself, and tells the other processes.
            self._old = {signal.SIGINT: signal.signal(signal.SIGINT, _as_sigterm)}
        if self._listen:
            # Python runs handlers between its own instructions only. A compilation is
            # one of them: meanwhile a thread answers, which is woken in C.
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)
            self._sockets[0].setblocking(True)
            self._old_fd = signal.set_wakeup_fd(
                self._sockets[1].fileno(), warn_on_full_buffer=False
            )
            self._old = {n: signal.signal(n, self._handle) for n in SIGNALS}
            _listening.append(self)
            threading.Thread(
                target=self._answer, args=(self._sockets[0],), daemon=True
            ).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        if self._sockets is not None:
            _listening.remove(self)
            signal.set_wakeup_fd(self._old_fd)
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _answer(self, end: socket.socket) -> None:
        while True:
            try:
                data = end.recv(1)
            except OSError:
                return
            if not data:
                return
            if data[0] not in SIGNALS:
                continue
            self._count += 1
            name = signal.Signals(data[0]).name
            if self._count > 1:
                say(f"{name} again: ended without saving")
                os._exit(128 + data[0])
            say(
                f"{name}, {self._doing_then or self.doing}: the run will save and end; "
                "a second signal ends it at once"
            )

    def _handle(self, number: int, _: Any) -> None:
        if self.received is None:
            self.received, self._doing_then = number, self.doing
            self._cut()

    def _cut(self) -> None:
        if self._may_cut and self.received is not None:
            self._may_cut = False
            raise Cut

    @contextlib.contextmanager
    def cutting(self, doing: str) -> Iterator[None]:
        """Lets a signal cut the work inside short, by raising :class:`Cut`."""
        self.doing = doing
        self._may_cut = True
        try:
            self._cut()
            yield
        finally:
            self._may_cut = False


def _as_sigterm(number: int, _: Any) -> None:
    del number
    os.kill(os.getpid(), signal.SIGTERM)


def say(text: str) -> None:
    """Prints a line to stderr, unless nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _forget() -> None:
    """Gives signals back in a forked child, which is not the run."""
    if _listening:
        for number, old in _listening[0]._old.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(-1)
        _listening.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
