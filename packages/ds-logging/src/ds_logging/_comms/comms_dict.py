"""What `CommsLogger.comms_dict` returns: a copy of what was counted, of which one may ask to forget everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ds_logging.errors import ReadOnlyError


class CommsDict(dict[str, dict[int, list[Any]]]):
    """{record name: {message size: [count, latencies, algorithm bandwidths, bus bandwidths]}}, to be read.

    It is a copy: later operations do not show in it. `clear` empties the log that it came from; every other change
    would be lost, and raises. Copies and pickles are plain dicts.

    Args:
        counted: what `CommsLogger.get_raw_data` returns.
        reset: empties the log.
    """

    def __init__(self, counted: dict[str, dict[int, list[Any]]], reset: Callable[[], None]) -> None:
        super().__init__(counted)
        self._reset = reset

    def clear(self) -> None:
        """Empty this dict and the log."""
        self._reset()
        super().clear()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise ReadOnlyError(
            "comms_dict is a copy, a change would be lost: count with append(), forget everything with reset_data(), "
            "and change a dict(comms_dict) of your own"
        )

    __setitem__ = __delitem__ = __ior__ = pop = popitem = setdefault = update = _refuse
