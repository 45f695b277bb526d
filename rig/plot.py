#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw a migration: the guest's speed, and what page faults it took.

  rig/plot.py REPORT.json PICTURE.png
"""

import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt     # noqa: E402 (the backend comes first)

WINDOW = 1.0        # seconds over which a rate is taken
INK = '#2b2d42'
SPEED = '#1d7874'
EXITS = '#d1495b'
FAULTS = '#e8a33d'
PHASES = {'active': ('pre-copy', '#dfe7fd'),
          'postcopy': ('post-copy', '#fde2e4')}


def rates(points):
    """Rates per second of [seconds, count] points: two lists for plot().

    Each rate is that of the window around its time, so that single late
    reports do not show as dips and peaks.
    """
    times, values = [], []
    first = last = 0
    for when, _ in points:
        while points[first][0] < when - WINDOW / 2:
            first += 1
        while last + 1 < len(points) and points[last + 1][0] <= when + WINDOW / 2:
            last += 1
        span = points[last][0] - points[first][0]
        if span > WINDOW / 4:
            times.append(when)
            values.append((points[last][1] - points[first][1]) / span)
    return times, values


def phase_spans(report):
    """(label, colour, start, end) of the phases, in seconds."""
    moments = report['moments']
    switch = moments.get('postcopy_s', moments['end_s'])
    yield *PHASES['active'], moments['start_s'], switch
    yield *PHASES['postcopy'], switch, moments['end_s']


def shade(axes, report):
    for axis in axes:
        for _, colour, start, end in phase_spans(report):
            axis.axvspan(start, end, color=colour, lw=0, zorder=0)
        axis.axvline(report['moments']['end_s'], color=INK, lw=0.8, ls=':')
    top = axes[0]
    for label, _, start, end in phase_spans(report):
        if end - start > 0.02 * (top.get_xlim()[1] - top.get_xlim()[0]):
            top.text((start + end) / 2, 1.02, label, ha='center', color=INK,
                     fontsize=9, transform=top.get_xaxis_transform())


def draw_speed(axis, report):
    times, values = rates(report['guest_reports'])
    axis.fill_between(times, values, color=SPEED, alpha=0.18, lw=0)
    axis.plot(times, values, color=SPEED, lw=1.8)
    axis.set_ylabel('guest operations/s', color=SPEED)
    moments = report['moments']
    for phase in ('before', 'after'):
        axis.hlines(report[f'ops_{phase}'], moments[f'{phase}_start_s'],
                    moments[f'{phase}_end_s'], color=INK, lw=0.8, ls='--')


def draw_faults(axis, report):
    samples = report['samples']
    series = [('userfault_exits', 'userfault exits', EXITS)]
    if not report['userfault_exits']:
        series = [('page_requests', 'page requests (userfaultfd)', FAULTS)]
    for key, label, colour in series:
        times, values = rates([(s['t_s'], s[key]) for s in samples])
        axis.fill_between(times, values, color=colour, alpha=0.25, lw=0)
        axis.plot(times, values, color=colour, lw=1.8, label=label)
    axis.set_ylabel('per second')
    left = axis.twinx()
    left.plot([s['t_s'] for s in samples], [s['pages_left'] for s in samples],
              color=INK, lw=1, ls='--')
    left.set_ylabel('pages left (dashed)')
    left.set_ylim(bottom=0)
    left.spines['top'].set_visible(False)
    axis.legend(loc='upper right', frameon=False)


def title(report):
    used = ('KVM Userfault' if report['userfault_enabled']
            else 'plain userfaultfd')
    latency = report['latency_us']
    return (f'Post-copy with {used}: {report["vcpus"]} vCPUs, '
            f'{report["touched_mib"]} MiB at work, '
            f'downtime {report["downtime_ms"]} ms\n'
            f'{report["userfault_exits"]} userfault exits, userfaultfd faults: '
            f'{report["userfaultfd_vcpu_faults"]} by vCPUs and '
            f'{report["userfaultfd_other_faults"]} by others; wait p50 '
            f'{latency["p50"]} us, p99 {latency["p99"]} us; '
            f'{report["pages_corrupt"]} corrupt pages')


def draw(report, path):
    """Write the picture in one piece."""
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(11, 6.5),
                                height_ratios=(3, 2), layout='constrained')
    draw_speed(axes[0], report)
    draw_faults(axes[1], report)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(axis='y', color='#cccccc', lw=0.5)
        axis.spines[['top', 'right']].set_visible(False)
        axis.margins(x=0)
    axes[0].set_xlim(right=report['moments']['after_end_s'])
    shade(axes, report)
    axes[1].set_xlabel('seconds since the start of the migration '
                       '(emulated hosts: compare, do not quote)')
    figure.suptitle(title(report), fontsize=11, color=INK, x=0.01, ha='left')
    new = Path(path).with_name(Path(path).name + '.new')
    figure.savefig(new, dpi=130, format='png')
    new.replace(path)
    plt.close(figure)


if __name__ == '__main__':
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
