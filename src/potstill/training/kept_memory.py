"""On a CPU, the memory that a training step frees is kept for the next one.

Every step makes the tensors of the step before. When a large one is freed, glibc gives it back to the system, and the next step
asks for it again: page by page, each an interrupt and 4 kB of zeros, a hundred thousand of them in a step of the demo and a
fifth of its time (docs/decisions/0008). On a GPU torch's own allocator keeps what is freed.
"""

from __future__ import annotations

import ctypes
import os
import sys

# What <malloc.h> calls them.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}


def keep_freed_memory() -> bool:
    """Ask glibc for that, for the whole process and for good; whether it agreed.

    Nothing is asked of another C library, nor where the environment has settled it: ``MALLOC_TRIM_THRESHOLD_=131072``, glibc's
    own value, leaves things as they are.
    """
    if sys.platform != "linux" or ENVIRONMENT & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
