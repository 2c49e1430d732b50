"""The message of a record, formatted only when somebody writes it, and tagged with its rank."""

from __future__ import annotations

from typing import Any


class TaggedText(str):
    """A text that says its rank already."""

    __slots__ = ()
    tagged = True


class RankedMessage:
    """What `log_dist` puts into a record: ``str()`` of it is the tag and the message.

    It is formatted inside the handler, so that a ``__str__`` that raises and wrong ``%`` arguments go where logging
    sends errors; and once, however many handlers there are.
    """

    __slots__ = ("_args", "_message", "_tag", "_text")
    tagged = True

    def __init__(self, tag: str, message: object, args: tuple[Any, ...]) -> None:
        self._tag = tag
        self._message = message
        self._args = args
        self._text: str | None = None

    def text(self) -> str:
        """Return the message without the tag."""
        text = self._text
        if text is None:
            args: Any = self._args
            if len(args) == 1 and isinstance(args[0], dict) and args[0]:
                args = args[0]  # "%(loss)s", as logging does
            text = self._text = str(self._message) % args if args else str(self._message)
        return text

    def __str__(self) -> str:
        return self._tag + self.text()

    def __repr__(self) -> str:
        return f"<message of {self._tag.strip('[] ')}>"  # formats nothing: a debugger may ask

    # A record that goes to another process is text.
    def __reduce__(self) -> tuple[Any, ...]:
        return TaggedText, (str(self),)
