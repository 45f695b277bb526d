#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""In a virtual host: hold one TCP session to a guest, and time its replies.

usage: probe.py ADDRESS PORT STOP

Sends a number a line to the guest's echo server, waits for the same one to come
back, and sends the next. It ends when a file STOP is there, and prints a JSON object:
replies; longest_ms, the longest wait for one; and error, null if the session held
and every reply was right. The session is never opened anew.
"""

import json
import os
import socket
import sys
import time

PAUSE = 0.01        # between a reply and the next question
LIMIT = 300         # for one reply: more than any pause that a test makes
ASK = 5             # whether the other end knows the session, if it is silent
CONNECT_LIMIT = 60


def connect(address, port):
    """The guest's network may not be up yet."""
    end = time.monotonic() + CONNECT_LIMIT
    while True:
        try:
            return socket.create_connection((address, port), timeout=5)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def probe(session, stop):
    """(replies, longest wait in seconds, error or None)"""
    replies, longest = 0, 0.0
    session.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    session.settimeout(LIMIT)
    # A guest that was reset does not, and says so.
    session.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, ASK), (socket.TCP_KEEPINTVL, ASK),
                          (socket.TCP_KEEPCNT, LIMIT // ASK)):
        session.setsockopt(socket.IPPROTO_TCP, option, value)
    answers = session.makefile('rb')
    while not os.path.exists(stop):
        question = b'%d\n' % replies
        start = time.monotonic()
        try:
            session.sendall(question)
            answer = answers.readline()
        except OSError as error:
            return replies, max(longest, time.monotonic() - start), str(error)
        if answer != question:
            return replies, longest, f'{question!r} was answered by {answer!r}'
        longest = max(longest, time.monotonic() - start)
        replies += 1
        time.sleep(PAUSE)
    return replies, longest, None


def main():
    address, port, stop = sys.argv[1:]
    try:
        replies, longest, error = probe(connect(address, int(port)), stop)
    except OSError as found:
        replies, longest, error = 0, 0.0, f'no session: {found}'
    print(json.dumps({'replies': replies, 'longest_ms': round(longest * 1000),
                      'error': error}))
    return int(error is not None)


if __name__ == '__main__':
    sys.exit(main())
