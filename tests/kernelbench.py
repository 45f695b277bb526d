# SPDX-License-Identifier: GPL-2.0-or-later
"""The table and the picture of tests/bench-kernel."""

import statistics

COLOURS = ['#2b2d42', '#e8a33d', '#f2cc8f', '#8d99ae', '#1d7874', '#679289',
           '#d1495b']


def shares(row):
    """Mode: share of what is done when nothing is trapped, in per cent."""
    return {mode: 100 * rate / row['median']['none']
            for mode, rate in row['median'].items()}


def off_cost(report):
    """(memory, base, patched, difference, noise), the last two in per cent."""
    counts = report.get('off') or {}
    for memory, runs in counts.get('base', {}).items():
        base = statistics.median(runs)
        ours = statistics.median(counts['patched'][memory])
        yield (memory, base, ours, 100 * (ours - base) / base,
               100 * (max(runs) - min(runs)) / base)


def path_lines(report):
    """Instructions per page, and in brackets how "none" compares in per cent."""
    for memory, counts in (report.get('path') or {}).items():
        yield f'\ninstructions per page, 1 vCPU, {memory}:'
        for name, count in counts.items():
            yield f'  {name:18} {count:8.0f} ({100 * counts["none"] / count:3.0f}%)'


def table(report, modes):
    """Pages per second, and in brackets the share of none in per cent."""
    lines = [f'{report["kernel"]} ({report["arch"]}) in {report["emulator"]}, '
             f'{report["host_cpus"]} processors; median of {report["repeat"]}',
             '',
             f'{"memory":10} {"fds":9} {"vCPUs":>5}'
             + ''.join(f' {mode:>18}' for mode in modes)]
    for row in report['rows']:
        share = shares(row)
        cells = (f' {row["median"][mode]:11.0f} ({share[mode]:3.0f}%)'
                 if mode in share else f' {"-":>18}' for mode in modes)
        lines.append(f'{row["memory"]:10} {row["fds"]:9} {row["vcpus"]:5}'
                     + ''.join(cells))
    lines += path_lines(report)
    for memory, base, ours, difference, noise in off_cost(report):
        lines.append(f'\nnot used, {memory}: base {base:.0f}, patched {ours:.0f} '
                     f'instructions per page ({difference:+.1f} %; runs on the base '
                     f'kernel are {noise:.1f} % apart)')
    return '\n'.join(lines)


def draw(report, modes, path):
    """One panel per kind of memory and of userfaultfd: share by vCPUs."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    panels = sorted({(row['memory'], row['fds']) for row in report['rows']})
    figure, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False,
                                figsize=(4.2 * len(panels), 4.6))
    for axis, (memory, fds) in zip(axes[0], panels):
        rows = [row for row in report['rows'] if row['memory'] == memory
                and (row['fds'] == fds or row['vcpus'] == 1)]
        rows.sort(key=lambda row: row['vcpus'])
        for mode, colour in zip(modes, COLOURS):
            points = [(row['vcpus'], shares(row)[mode]) for row in rows
                      if mode in row['median']]
            if points and mode != 'none':
                axis.plot(*zip(*points), marker='o', color=colour, label=mode)
        axis.set_title(f'{memory}, userfaultfd: {fds}', fontsize=10)
        axis.set_xscale('log', base=2)
        axis.set_xticks([row['vcpus'] for row in rows])
        axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.set_xlabel('vCPUs')
        axis.grid(axis='y', color='#cccccc', lw=0.6)
    axes[0][0].set_ylim(bottom=0)       # of all: they share it
    axes[0][0].set_ylabel('pages/s, % of no trapping')
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc='lower center', ncol=len(labels),
                  frameon=False, fontsize=9)
    figure.suptitle(f'Demand paging, {report["arch"]}, {report["kernel"]}, '
                    f'{report["host_cpus"]} emulated processors', fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
