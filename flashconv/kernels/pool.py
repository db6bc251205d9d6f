"""How many threads the kernels work on"""
import os
from math import inf
from pathlib import Path


def _lines(path):
    "What a file says, line by line; nothing where there is none."
    try: return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError): return []


def _folders(root):
    "Where Linux keeps the limits of this process: its control groups and those around them."
    for line in _lines(Path(root, "proc/self/cgroup")):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "cpu" not in controllers.split(","): continue
        mount = Path(root, "sys/fs/cgroup", "cpu" if controllers else "")
        group = mount / path.strip("/")
        yield from (mount / part for part in (group, *group.parents) if part.is_relative_to(mount))


def quota(
    root: str = "/",  # where proc and sys are mounted
) -> float:  # infinite if nothing is said
    "How many processors' worth of time a container grants this process."
    least = inf
    for folder in _folders(root):
        limit = " ".join(_lines(folder / "cpu.max")).split()
        limit = limit or _lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us")
        try: time, period = map(int, limit)
        except ValueError: continue  # "max", or no such files
        if time > 0 and period > 0: least = min(least, time / period)
    return least


def threads() -> int:
    """How many threads the kernels are to work on: the processors that this process may use.

    `FLASHCONV_THREADS` says otherwise. Raises `ValueError` if it is no whole number above 0.
    """
    asked = os.environ.get("FLASHCONV_THREADS", "")
    if asked:
        if not asked.isdecimal() or not 1 <= int(asked) <= LIMIT:
            raise ValueError(f"FLASHCONV_THREADS must be 1 to {LIMIT}, but got {asked!r}")
        return int(asked)
    allowed = len(os.sched_getaffinity(0))
    return max(1, int(min(allowed, quota(), LIMIT)))


LIMIT = 1024  # more threads than any processor has, and fewer than any system refuses
