"""The processor of this machine, as far as files that were optimized for it depend on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

#: Beginnings of the names of extensions that libraries choose their kernels and their packing by.
_EXTENSIONS = ("avx", "amx", "fma", "asimd", "sve", "i8mm", "bf16")


@cache
def processor() -> str:
    """Return the kind of processor with its extensions, such as ``x86_64 avx avx2 fma``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join([platform.machine(), *sorted(flag for flag in flags if flag.startswith(_EXTENSIONS))])
