# SPDX-License-Identifier: GPL-2.0-or-later
"""What a prepared source was made from."""

import hashlib
import json


def digest(*parts):
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


def patches_key(comp):
    return digest(*[name + (comp.patches / name).read_text()
                    for name, _ in comp.series()])


class Stamp(dict):
    """What the prepared source was made from, kept beside it."""

    def __init__(self, comp):
        super().__init__()
        self.path = comp.build / 'prepared'
        if self.path.exists() and comp.src.exists():
            self.update(json.loads(self.path.read_text()))

    def save(self):
        tmp = self.path.with_suffix('.tmp')
        tmp.write_text(json.dumps(self, indent=1) + '\n')
        tmp.rename(self.path)
