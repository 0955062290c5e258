"""Keep freed memory for the next training step, on a CPU.

Each step allocates the same tensors. glibc returns a large freed one to the system, and the next
step gets it again page by page, each filled with zeros: in the demo a hundred thousand page faults
and a fifth of the time (docs/decisions/0008). On a GPU torch's allocator keeps freed memory.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in this process; return whether it accepted.

    Does nothing for another C library, or if the environment sets it already. To keep glibc's
    default, set ``MALLOC_TRIM_THRESHOLD_=131072``.
    """
    if sys.platform != "linux" or ENVIRONMENT & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
