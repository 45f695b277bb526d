# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong with a virtual host, and what its serial log says."""

import re

# A kernel that prints one of these has a defect, whatever the command returned.
WARNING_LINE = re.compile(
    r'\bWARNING: |\bBUG: |\bKASAN: |\bUBSAN: |\bKCSAN: |\bOops: |'
    r'INFO: task .* blocked for more than|INFO: .*detected stalls? on|'
    r'INFO: .*self-detected stall|possible (circular|recursive) locking|'
    r'inconsistent lock state|unchecked MSR access error|'
    r'watchdog: .*soft lockup|general protection fault|'
    r'[Kk]ernel NULL pointer dereference')
PANIC_LINE = re.compile(r'Kernel panic - not syncing|end Kernel panic')


class RigError(Exception):
    """The rig itself failed: something is missing or could not be started."""
    exit_code = 119

    def __init__(self, message, log=None, lines=()):
        super().__init__(message)
        self.log = log
        self.lines = list(lines)

    def __str__(self):
        parts = [super().__str__()]
        parts += ['    ' + line for line in self.lines]
        if self.log:
            parts.append(f'serial log: {self.log}')
        return '\n'.join(parts)


class LostVM(RigError):
    """The virtual host ended without a word about the command's status."""
    exit_code = 120


class Panic(RigError):
    """The virtual host's kernel panicked."""
    exit_code = 121


class KernelWarning(RigError):
    """The kernel complained, though the command may have succeeded."""
    exit_code = 122


class Timeout(RigError):
    """The command did not end in its time."""
    exit_code = 123


def read_lines(log):
    """The lines of a serial log, which may be missing or hold any byte."""
    try:
        with open(log, encoding='utf-8', errors='replace') as stream:
            return [line.rstrip() for line in stream]
    except FileNotFoundError:
        return []


def matching(lines, pattern, context=4, limit=12):
    """Lines that match, each with some that follow; [] if none does."""
    picked = []
    last = -1
    for number, line in enumerate(lines):
        if pattern.search(line):
            last = number + context
        if number <= last:
            picked.append(line)
    return picked[:limit]


def from_log(log, what):
    """The error a host that ended unexpectedly is to be reported as."""
    lines = read_lines(log)
    panic = matching(lines, PANIC_LINE, context=8, limit=16)
    if panic:
        return Panic(f'{what}: kernel panic', log, panic)
    return LostVM(f'{what}: ended without an exit status', log, lines[-8:])


def check_warnings(log, what):
    """Raise KernelWarning if the serial log holds a line that is one."""
    found = matching(read_lines(log), WARNING_LINE)
    if found:
        raise KernelWarning(f'{what}: the kernel complained', log, found)
