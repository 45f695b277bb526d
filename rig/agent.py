#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""In a virtual host: run commands for whoever is outside, several at a time.

Reads {"id", "argv", "input", "timeout"} from the port "agent", a JSON object a
line, and answers each with {"id", "status", "output"} when it is done: standard
output and error together, and a status of 124 after a time-out. {"quit": true}
ends the job. The other end is Agent, below, which needs the port's socket.
"""

import json
import subprocess
import sys
import threading
import time

PORT = '/dev/virtio-ports/agent'


class Agent:
    """Outside: commands in one virtual host, through the socket of its port."""

    def __init__(self, name, sock):
        self.name = name
        self._sock = sock
        self._arrived = threading.Condition()
        self._answers = {}
        self._last = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        rest = b''
        try:
            while data := self._sock.recv(65536):
                *lines, rest = (rest + data).split(b'\n')
                for line in lines:
                    answer = json.loads(line)
                    with self._arrived:
                        self._answers[answer['id']] = answer
                        self._arrived.notify_all()
        except OSError:
            pass        # the host has been stopped

    def start(self, argv, text='', timeout=300):
        """Start a command, and return what wait() takes."""
        with self._arrived:
            self._last += 1
            number = self._last
        self._send({'id': number, 'argv': [str(word) for word in argv],
                    'input': text, 'timeout': timeout})
        return number

    def _send(self, message):
        self._sock.sendall(json.dumps(message).encode() + b'\n')

    def wait(self, number, check=lambda: None):
        """(status, output) of a command that was started.

        check is called now and then, to raise what makes waiting pointless.
        """
        with self._arrived:
            while number not in self._answers:
                self._arrived.wait(0.5)
                check()
            answer = self._answers.pop(number)
        return answer['status'], answer['output']

    def done(self, number):
        """Whether it is over."""
        with self._arrived:
            return number in self._answers

    def quit(self):
        """End the host's job, and with it the host."""
        self._send({'quit': True})


def run(request, answer):
    try:
        done = subprocess.run(
            request['argv'], input=request['input'].encode(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=request['timeout'], check=False)
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, error.stdout or b''
    except OSError as error:
        status, output = 127, str(error).encode()
    answer({'id': request['id'], 'status': status,
            'output': output.decode('utf-8', 'replace')})


def main():
    lock = threading.Lock()
    with open(PORT, 'r+b', buffering=0) as port:
        def answer(message):
            with lock:
                port.write(json.dumps(message).encode() + b'\n')

        rest = b''
        while True:
            data = port.read(65536)
            if not data:
                time.sleep(0.1)     # nobody has connected yet
                continue
            *lines, rest = (rest + data).split(b'\n')
            for line in lines:
                request = json.loads(line)
                if request.get('quit'):
                    return 0
                threading.Thread(target=run, args=(request, answer),
                                 daemon=True).start()


if __name__ == '__main__':
    sys.exit(main())
