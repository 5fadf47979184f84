"""One setting of the C allocator for every contender.

glibc returns each large block to the system when it is freed and fetches fresh pages for the next one; the
page faults can cost as much as the computation. KEEP makes it hold on to freed memory, as caching allocators
do; it is what every row is timed under, unless --allocator system asks for the platform's own behaviour.
RETURN is the opposite, each block its own mapping, under which resident memory follows what is in use.
"""

from __future__ import annotations

import ctypes
import os

# mallopt's parameter numbers, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_SETTINGS = {
    "keep": {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20},
    "return": {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 0, _MMAP_THRESHOLD: 64 << 10},
}
_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version.restype = ctypes.c_char_p
        library.gnu_get_libc_version()
    except (OSError, AttributeError, TypeError):
        return None
    return library


def apply(name: str) -> bool:
    """Applies "keep" or "return" to this process; False where the C library is not glibc. Can be called again."""
    library = _glibc()
    if library is None:
        return False
    done = all(library.mallopt(number, value) for number, value in _SETTINGS[name].items())
    if name == "return":
        library.malloc_trim(0)
    return done


def describe(name: str) -> str:
    """One line for the header and the rows: the setting in force and the environment's own variables."""
    if name == "system":
        text = "system default"
    elif _glibc() is None:
        text = "system default (not glibc)"
    else:
        text = "glibc keeping freed memory (mmap_max 0, no trim)"
    named = " ".join(
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if value and (name in _VARIABLES or name.startswith("MALLOC_"))
    )
    return f"{text}; {named}" if named else text
