"""How the C library treats the large buffers of a program on a CPU."""

import ctypes
import os
import sys

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_large_buffers() -> bool:
    """Lets glibc reuse buffers above 32 MB, as it does smaller ones, and not hand them back.

    XLA asks for a program's buffers anew at each call. Above 32 MB glibc takes them from the kernel
    each time, which zeroes them page by page: FGSM on 512 MNIST images took 0.146 CPU seconds, and
    0.098 without that (one comparison, on a busy machine). The price
    is that the process keeps the memory that it once needed. It is done when `advjax` is imported,
    unless ADVJAX_KEEP_BUFFERS=0 or glibc's own MALLOC_... variables are set; it changes no number.

    Returns:
      Whether it was done; only glibc on Linux has this setting.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or os.environ.get("ADVJAX_KEEP_BUFFERS") == "0" or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
