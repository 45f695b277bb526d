# SPDX-License-Identifier: GPL-2.0-or-later
"""Run several commands in one virtual host, and tell their results apart.

A virtual host takes seconds to boot, so commands share one. Before and after
each, the script in the host prints a line that only it can print.
"""

import os
import shlex
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TIMED_OUT = 124         # the exit status of timeout(1)
TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / 'rig'))

from errors import RigError                     # noqa: E402
from vhost import Options, VirtualHost          # noqa: E402


@dataclass
class Result:
    """What became of a command; status None: the host did not get to it."""
    name: str
    argv: list
    status: int = None
    seconds: float = 0
    timeouts: int = 0
    lines: list = field(default_factory=list)


class Job:
    """Commands for one host. done is called with each Result in its turn.

    All that they print goes to the log as it comes, too.
    """

    def __init__(self, options, done, limit=300, attempts=1, post_mortem='',
                 ending='-k 5'):
        """limit is that of each attempt at a command, in seconds.

        A command that does not end in time is begun anew, up to attempts in
        all, after the shell command post_mortem had a look at what it left.
        How timeout(1) ends it is up to its options in ending.
        """
        self.options, self.done, self.limit = options, done, limit
        self.attempts, self.post_mortem = attempts, post_mortem or ':'
        self.ending = ending
        self.log = options.log.with_name(f'{options.name}.log')
        self.mark = uuid.uuid4().hex
        self.results, self.current, self.begun, self.rest = [], None, 0, b''

    def add(self, name, argv):
        self.results.append(Result(name, [str(a) for a in argv]))

    def run(self):
        """Returns None, or the RigError that ended the host."""
        error = None
        try:
            with (open(self.log, 'wb', buffering=0) as self._out,
                  VirtualHost(self.options, ['sh', '-c', self._script()],
                              self._take) as host):
                host.wait()
        except RigError as e:
            error = e
        for result in self.results:
            if result.status is None:
                self.done(result)
        return error

    def _script(self):
        lines = []
        for number, result in enumerate(self.results):
            lines += [f'echo {self.mark} begin {number}',
                      f'for attempt in $(seq {self.attempts}); do',
                      f'timeout {self.ending} {self.limit} {shlex.join(result.argv)}',
                      f'status=$?; [ $status = {TIMED_OUT} ] || break',
                      f'echo; echo {self.mark} late; {self.post_mortem}; done',
                      f'echo; echo {self.mark} end $status']
        return '\n'.join(lines)

    def _take(self, data):
        self._out.write(data)
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self._line(line.decode(errors='replace').rstrip())

    def _line(self, line):
        words = line.split()
        if words[:2] == [self.mark, 'begin']:
            self.current = self.results[int(words[2])]
            self.begun = time.monotonic()
        elif words[:2] == [self.mark, 'late']:
            self.current.timeouts += 1
            self.current.lines.append(f'not done after {self.limit} s')
        elif words[:2] == [self.mark, 'end']:
            self.current.status = int(words[2])
            self.current.seconds = time.monotonic() - self.begun
            self.done(self.current)
        elif self.current:
            self.current.lines.append(line)


def options(name, **more):
    """The options of a host whose logs are in build/check."""
    return Options(name=name, log=TOP / 'build/check' / f'{name}.serial.log',
                   **more)


def side_by_side(function, items):
    """The results of function for each of items, in threads of their own.

    Ctrl-C ends the process, and the emulators with it, see VirtualHost.
    """
    with ThreadPoolExecutor() as pool:
        try:
            return list(pool.map(function, items))
        except KeyboardInterrupt:
            os._exit(130)
