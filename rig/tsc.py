# SPDX-License-Identifier: GPL-2.0-or-later
"""The frequency of this machine's time stamp counter.

An emulated processor's counter is this machine's. Each virtual host would
calibrate it for itself, and a busy machine makes them disagree; a guest that
migrates between hosts of different frequency has no working timers, because
emulated SVM cannot scale. So they are told, all the same.
"""

import ctypes
import mmap
import platform
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
READ_TSC = bytes.fromhex('0f31 48c1e220 4809d0 c3')
INTERVAL = 0.1      # seconds to measure over


def frequency_khz():
    """The frequency, good to some parts per million; None if there is none."""
    if platform.machine() != 'x86_64':
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE,
                         prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None         # a machine that forbids such pages
    page.write(READ_TSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return _measure(ctypes.CFUNCTYPE(ctypes.c_uint64)(address))


def _measure(read_tsc):
    first, start = _moment(read_tsc)
    time.sleep(INTERVAL)
    last, end = _moment(read_tsc)
    return round((last - first) * 1e6 / (end - start))


def _moment(read_tsc):
    """A counter and a time in ns, read as close together as can be had."""
    best = None
    for _ in range(20):
        before = time.monotonic_ns()
        counter = read_tsc()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = after - before, counter, (before + after) // 2
    return best[1:]
