# SPDX-License-Identifier: GPL-2.0-or-later
"""Host c: a client on the network, with a TCP session to the guest."""

import json

from agent import Agent
from errors import RigError
from vhost import TOP, VirtualHost

GUEST_IP = '10.77.0.9'
ECHO_PORT = 7
STOP = '/run/probe-stop'


def guest_ip_parameter():
    """What gives the guest its address, on its kernel's command line."""
    return f'ip={GUEST_IP}:::255.255.255.0::eth0:off'


class Client:
    """The third host of trio_options(), once it is booted; a context manager."""

    def __init__(self, options):
        self.host = VirtualHost(options, [TOP / 'rig/agent.py'])
        self.agent = None
        self._probe = None

    def __enter__(self):
        self.host.__enter__()
        self.agent = Agent('c', self.host.sockets['agent'])
        return self

    def __exit__(self, *exc):
        self.host.__exit__(*exc)

    def open_session(self):
        """Connect to the guest, and time its replies from now on."""
        self._probe = self.agent.start(
            [TOP / 'rig/probe.py', GUEST_IP, ECHO_PORT, STOP], timeout=7200)

    def close_session(self):
        """How the session went, see probe.py: replies, longest_ms, error."""
        self._wait(self.agent.start(['touch', STOP]))
        text = self._wait(self._probe)
        self._wait(self.agent.start(['rm', STOP]))
        try:
            return json.loads(text)
        except ValueError as error:
            raise RigError(f'the client says: {text}') from error

    def _wait(self, number):
        return self.agent.wait(number, self.host.check)[1]

    def power_off(self):
        """End the host in order; raises if its kernel complained."""
        self.agent.quit()
        self.host.wait()
