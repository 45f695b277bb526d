# SPDX-License-Identifier: GPL-2.0-or-later
"""Run several commands in one virtual host, and tell their results apart.

A virtual host takes seconds to boot, so commands share one. Before and after
each, the script in the host prints a line that only it can print.
"""

import shlex
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

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
    lines: list = field(default_factory=list)


class Job:
    """Commands for one host. done is called with each Result in its turn."""

    def __init__(self, options, done, limit=300):
        """limit is that of each command, in seconds."""
        self.options, self.done, self.limit = options, done, limit
        self.mark = uuid.uuid4().hex
        self.results, self.current, self.rest = [], None, b''

    def add(self, name, argv):
        self.results.append(Result(name, [str(a) for a in argv]))

    def run(self):
        """Returns None, or the RigError that ended the host."""
        error = None
        try:
            with VirtualHost(self.options, ['sh', '-c', self._script()],
                             self._take) as host:
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
                      f'timeout -k 5 {self.limit} {shlex.join(result.argv)}',
                      f'echo; echo {self.mark} end $?']
        return '\n'.join(lines)

    def _take(self, data):
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self._line(line.decode(errors='replace').rstrip())

    def _line(self, line):
        words = line.split()
        if words[:2] == [self.mark, 'begin']:
            self.current = self.results[int(words[2])]
        elif words[:2] == [self.mark, 'end']:
            self.current.status = int(words[2])
            self.done(self.current)
        elif self.current:
            self.current.lines.append(line)


def options(name, **more):
    """The options of a host whose logs are in build/check."""
    return Options(name=name, log=TOP / 'build/check' / f'{name}.serial.log',
                   **more)
