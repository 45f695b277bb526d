# SPDX-License-Identifier: GPL-2.0-or-later
"""Write test results in TAP, one point each, as soon as they are known.

Threads may share one Tap.
"""

import threading


class Tap:
    def __init__(self):
        self.count = self.failed = 0
        self._lock = threading.Lock()

    def point(self, good, name, skip=None, why=''):
        """One result; skip is the reason, if the test was not run."""
        tail = '' if skip is None else f' # SKIP {skip}'
        with self._lock:
            self.count += 1
            self.failed += not good
            print('ok' if good else 'not ok', self.count, '-',
                  name.replace('#', ' ') + tail, flush=True)
            if not good:
                self.note('why: ' + str(why))

    @staticmethod
    def note(text):
        """Lines for the log."""
        for line in str(text).splitlines():
            print('#', line, flush=True)

    def done(self):
        """The plan; returns the exit status."""
        print(f'1..{self.count}', flush=True)
        return int(self.failed > 0)
