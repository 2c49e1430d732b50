"""All operations by key, in memory that is bounded for any number of names, sizes, groups and dtypes.

[Note: bounds] Past ``max_sizes`` sizes of a record, a size is rounded up to a power of two. Past ``max_names`` records,
a name is counted under ``"(other)"``. Past `MAX_KEYS` keys altogether, an operation is counted under ``"(other)"``
without its group, its dtype and its kind, so it has no bus bandwidth. Operations and bytes are counted exactly all the
same.
"""

from __future__ import annotations

from collections import deque

from ds_logging._comms.op_stats import OpKey, OpStats
from ds_logging._log.logger import logger
from ds_logging._log.once import Once

OTHER = "(other)"
MAX_KEYS = 4096


class OpTable:
    """Statistics by key. Of several threads one at a time may use it: the owner holds a lock.

    Args:
        window: how many latencies are kept for each key.
        max_sizes: how many message sizes of a record are told apart.
        max_names: how many record names are told apart.
    """

    def __init__(self, *, window: int, max_sizes: int, max_names: int) -> None:
        self._window = window
        self._max_sizes = max_sizes
        self._max_names = max_names
        self._stats: dict[OpKey, OpStats] = {}
        self._sizes: dict[str, set[int]] = {}  # by record name
        self._warned = Once()

    def add(self, wanted: OpKey, latency: float | None) -> OpKey:
        """Count one operation of ``wanted.msg_size`` bytes and return the key that it is counted under."""
        key = self._key_to_count(wanted)
        stats = self._stats.get(key)
        if stats is None:
            stats = self._stats[key] = OpStats(key, deque(maxlen=self._window))
            self._sizes.setdefault(key.record_name, set()).add(key.msg_size)
        stats.add(latency, wanted.msg_size)
        if key.record_name == OTHER and wanted.record_name != OTHER:
            self._warn(key)
        return key

    def _key_to_count(self, wanted: OpKey) -> OpKey:
        if wanted in self._stats:
            return wanted
        rounded = 1 << max(wanted.msg_size - 1, 0).bit_length() if wanted.msg_size else 0
        key = wanted
        if wanted.record_name not in self._sizes and len(self._sizes.keys() - {OTHER}) >= self._max_names:
            key = wanted._replace(record_name=OTHER, msg_size=rounded)
        else:
            sizes = self._sizes.get(wanted.record_name, ())
            if wanted.msg_size not in sizes and len(sizes) >= self._max_sizes:
                key = wanted._replace(msg_size=rounded)
        if key not in self._stats and len(self._stats) >= MAX_KEYS:
            key = OpKey(OTHER, OTHER, rounded, 1)
        return key

    def _warn(self, key: OpKey) -> None:
        full = key.raw_name == OTHER
        if not self._warned.first(full):
            return
        if full:
            what, how = f"{MAX_KEYS} kinds of operations", f"{OTHER!r}, without their group"
        else:
            what, how = f"{self._max_names} record names", f"{OTHER!r}; use fewer names, or raise max_names"
        logger.warning("the communication log holds %s: further ones are counted as %s", what, how)

    def snapshot(self) -> list[OpStats]:
        """Return copies of all statistics, in the order of their first operation."""
        return [stats.copy() for stats in self._stats.values()]

    def clear(self) -> None:
        """Forget everything."""
        self._stats.clear()
        self._sizes.clear()
