# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP, by the module of the QEMU tree, over a socket that is there already."""

import asyncio
import json
import os
import socket
import subprocess
import sys

from errors import RigError, Timeout
from vhost import TOP

QEMU_PYTHON = os.environ.get('RIG_QEMU_PYTHON', str(TOP / 'build/qemu/src/python'))


def _protocol():
    """The synchronous client class; its tree is not on the default path."""
    if QEMU_PYTHON not in sys.path:
        sys.path.insert(0, QEMU_PYTHON)
    try:
        from qemu.qmp.legacy import QEMUMonitorProtocol
    except ImportError as error:
        raise RigError(f'no qemu.qmp in {QEMU_PYTHON} (RIG_QEMU_PYTHON): '
                       f'{error}') from error
    return QEMUMonitorProtocol


class Monitor:
    """One QMP connection. A failure of it is a MonitorError or a Timeout."""

    def __init__(self, name, sock, timeout=60):
        """Greets the QEMU at the other end, waiting for it to start.

        The socket remains the caller's. What an earlier QEMU there has said
        last is passed over.
        """
        self.name = name
        skip_to_greeting(sock)
        self._client = _protocol()(sock.dup())
        self._call('connect', self._client.connect)
        self._client.settimeout(timeout)

    def __call__(self, command, **arguments):
        """Run a command; underscores stand for dashes in argument names."""
        plain = {key.replace('_', '-'): value
                 for key, value in arguments.items()}
        return self._call(command, self._client.cmd, command, **plain)

    def oob(self, command, **arguments):
        """Run a command out of band: also while QEMU's main loop waits for a page."""
        answer = self._call(command, self._client.cmd_obj, {
            'exec-oob': command, 'arguments': arguments})
        if 'error' in answer:
            raise MonitorError(f'{self.name}: {command}: '
                               f'{answer["error"]["desc"]}')

    def statuses(self):
        """What QEMU has said of its migration since the last time, unasked.

        So it does not matter whether its main loop waits for a page.
        """
        found = []
        while events := self._call('events', self._client.get_events):
            found += [event['data']['status'] for event in events
                      if event['event'] == 'MIGRATION']
        return found

    def _call(self, what, function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except asyncio.TimeoutError as error:
            raise Timeout(f'{self.name}: {what}: no answer') from error
        except Exception as error:      # QMPError has no base with OSError
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise MonitorError(f'{self.name}: {what}: {error}') from error

    def close(self):
        """Hang up; an error in that is of no interest."""
        try:
            self._client.close()
        except Exception:       # the other end is gone, in whatever way
            pass


def skip_to_greeting(sock):
    """Leave nothing in the socket before QMP's greeting, which is there."""
    while True:
        text = sock.recv(1 << 16, socket.MSG_PEEK)
        start = text.find(b'{"QMP"')
        if start < 0:
            raise MonitorError(f'no QMP greeting, but: {text[:200]!r}')
        if start == 0:
            return
        sock.recv(start)


class MonitorError(RigError):
    """A QMP command failed, or the QEMU at the other end is gone."""


def accel_properties(qemu, firmware):
    """Names of the properties of -accel kvm that this binary knows."""
    commands = [{'execute': 'qmp_capabilities'},
                {'execute': 'qom-list-properties',
                 'arguments': {'typename': 'kvm-accel'}},
                {'execute': 'quit'}]
    text = '\n'.join(json.dumps(command) for command in commands)
    done = subprocess.run(
        [str(qemu), '-L', str(firmware), '-M', 'none', '-nodefaults',
         '-display', 'none', '-qmp', 'stdio'], input=text, text=True,
        capture_output=True, timeout=60)
    for line in done.stdout.splitlines():
        answer = json.loads(line).get('return')
        if isinstance(answer, list):
            return {entry['name'] for entry in answer}
    raise RigError(f'{qemu}: cannot list the properties of -accel kvm: '
                   f'{done.stderr.strip()}')
