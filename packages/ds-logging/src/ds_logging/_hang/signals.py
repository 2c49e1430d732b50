"""Wakes a thread at a signal, also while the main thread is inside C++ and runs no Python.

[Note: wakeup] Python runs a signal's handler on the main thread, between two instructions: never, while that thread
waits in a collective. But Python's own handler in C, which runs at once, writes the signal's number into the
*wakeup* file descriptor. A thread reads it here. Handlers of the application stay and run as ever; bytes for
an earlier wakeup descriptor (asyncio's) are passed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from types import FrameType

from ds_logging._log.logger import logger


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Keep the signal from ending the process; the thread does the work."""


class SignalListener:
    """Calls ``callback`` on a thread of its own each time that the process gets a signal.

    Args:
        number: the signal.
        callback: must not raise.
    """

    def __init__(self, number: int, callback: Callable[[], None]) -> None:
        self._number = number
        self._callback = callback
        self._previous: signal.Handlers | int | None = None
        self._installed = False
        self._old_fd = -1
        self._receiver: socket.socket | None = None
        self._sender: socket.socket | None = None
        self._thread: threading.Thread | None = None
        _listeners.add(self)

    def start(self) -> bool:
        """Listen, and say whether it is possible: on the main thread, where no C code has taken the signal."""
        if self._thread is not None:
            return True
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signal %d is not listened to: start it on the main thread", self._number)
            return False
        handler = signal.getsignal(self._number)
        if not callable(handler) and _caught_in_c(self._number):
            # faulthandler.register, for example. Taking it over would lose it.
            logger.warning("signal %d is not listened to: other C code has taken it", self._number)
            return False
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        if not callable(handler):
            self._previous = handler
            self._installed = True
            signal.signal(self._number, _do_nothing)
            signal.siginterrupt(self._number, False)  # let C++ go on with what it was waiting for
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="ds-logging-signal", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        """Give everything back as it was. On the main thread."""
        if self._thread is None or self._sender is None or self._receiver is None:
            return
        current = signal.set_wakeup_fd(-1)
        if current == self._sender.fileno():
            current = self._old_fd
        if current != -1:
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile
                signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        if self._installed and signal.getsignal(self._number) is _do_nothing:
            signal.signal(self._number, signal.SIG_DFL if self._previous is None else self._previous)
        self._installed = False
        self._sender.close()
        self._thread.join(timeout=5.0)
        self._receiver.close()
        self._thread = self._sender = self._receiver = None

    def forget(self) -> None:
        """Listen no more, in a forked child: its signals are not its parent's (workers of a data loader get some)."""
        if self._sender is not None:
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._sender.fileno()):
                signal.set_wakeup_fd(current)
        self._thread = self._sender = self._receiver = None

    def _listen(self) -> None:
        receiver = self._receiver
        assert receiver is not None
        while True:
            try:
                numbers = receiver.recv(4096)
            except OSError:
                return
            if not numbers:
                return
            if self._old_fd != -1:
                with contextlib.suppress(OSError):  # its owner has closed it, or does not read
                    os.write(self._old_fd, numbers)
            if self._number in numbers:
                self._callback()


_listeners: weakref.WeakSet[SignalListener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in list(_listeners):
        listener.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _caught_in_c(number: int) -> bool:
    """Say whether the process catches a signal that Python does not know of. Only Linux says."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration, ValueError):
        return False
    return bool(caught >> (number - 1) & 1)
