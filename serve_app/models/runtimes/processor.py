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


def computes_in_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16; without them it is slower than float32."""
    return "bf16" in processor()


def multiplies_int8() -> bool:
    """Return whether the processor adds up products of 8 bits without cutting them off at 16; others need 7 bits."""
    return "vnni" in processor() or not processor().startswith("x86_64")
