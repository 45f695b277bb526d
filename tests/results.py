# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of results."""

import json


def write(report, path):
    """All of it or nothing, whenever it is read."""
    partial = path.with_suffix('.tmp')
    partial.write_text(json.dumps(report, indent=1) + '\n')
    partial.rename(path)
