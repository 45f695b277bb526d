# SPDX-License-Identifier: GPL-2.0-or-later
"""One line that tells how a migration goes, for a terminal or a log."""

import sys
import time

PLAIN_INTERVAL = 3      # seconds between lines when output is no terminal


class Progress:
    """Shows the newest line; on a terminal, in place of the one before."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._width = 0
        self._last = 0.0

    def update(self, text):
        """Show text if it is time to."""
        now = time.monotonic()
        if self.live:
            self._write(f'\r{text:<{self._width}}')
            self._width = len(text)
        elif now - self._last >= PLAIN_INTERVAL:
            self._write(text + '\n')
            self._last = now

    def step(self, text):
        """Show text for good."""
        if self.live and self._width:
            self._write(f'\r{"":<{self._width}}\r')
        self._width = 0
        self._write(text + '\n')

    def _write(self, text):
        self.stream.write(text)
        self.stream.flush()
