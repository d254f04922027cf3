"""Anonymous memory of this process as the operating system counts it, and a limit on it.

Anonymous is what a program wrote and no file backs: it cannot be dropped when memory runs short. Pages of
mapped files can, and are not counted. Linux: RssAnon and VmSwap of /proc/self/status. macOS: internal and
compressed of task_info.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}


def parse_bytes(text: str | int) -> int:
    """ "3GB", "800 MiB" or 3000000000 as a number of bytes. Raises ValueError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        amount = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", str(text).lower())
        if not match:
            raise ValueError(f"{text!r} is not an amount of memory; wanted one like 3GB or 800MiB")
        amount = float(match[1]) * _UNITS[match[2] or ""]
    if amount <= 0:
        raise ValueError(f"{text!r} is not an amount of memory; wanted more than nothing")
    return int(amount)


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process now, None where the system does not tell."""
    if sys.platform == "darwin":
        return _darwin()
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith(("RssAnon:", "VmSwap:"))]
    except OSError:
        return None
    return sum(int(line[1]) << 10 for line in lines) if lines else None


def _darwin() -> int | None:
    # struct task_vm_info, flavor 22, in 64-bit words: 0 virtual size, 1 two counts, 2 resident and its peak,
    # 4 device and peak, 6 internal and peak, 8 external and peak, 10 reusable and peak, 12 three of purgeable
    # memory, 15 compressed
    words = (ctypes.c_uint64 * 64)()
    count = ctypes.c_uint32(2 * len(words))
    library = ctypes.CDLL(None)
    if library.task_info(library.mach_task_self(), 22, words, ctypes.byref(count)):
        return None
    return words[6] + words[15]


class MemoryExceededError(ValueError):
    """More memory was in use than is allowed."""


class Watch:
    """The highest anonymous memory while the block runs, looked at a hundred times a second.

    peak    bytes, None where the system does not tell
    check() raises MemoryExceededError once the limit was exceeded
    """

    def __init__(self, limit: int | None = None):
        self.limit, self.peak = limit, anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while self.peak is not None and not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes() or 0)

    def check(self) -> None:
        """Raises MemoryExceededError if more than the limit was in use."""
        if self.limit is not None and self.peak is not None and self.peak > self.limit:
            raise MemoryExceededError(
                f"{self.peak / 1e9:.3g} GB of anonymous memory were in use, more than the limit of "
                f"{self.limit / 1e9:.3g} GB (--max-memory)"
            )

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        if self.peak is not None:
            self.peak = max(self.peak, anonymous_bytes() or 0)
