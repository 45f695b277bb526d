# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables and the picture of tests/bench-migrate."""

COLOURS = ['#8d99ae', '#e8a33d', '#1d7874', '#d1495b', '#2b2d42']


def busy(side, thread):
    """How much of the post-copy phase a thread had a processor, %.

    Of threads that there are for a migration only: what others took has what they
    did before it and afterwards in it.
    """
    return lambda m: 100 * m[f'cpu_{side}_s'].get(f'mig/{thread}', 0) \
        / max(m['postcopy_s'], 0.1)


# Title, and what it takes from the medians of a mode.
MEASURES = [
    ('pages on demand per second', lambda m: m['demand_per_s']),
    ('wait for a page, p50, us', lambda m: m['latency_us']['p50']),
    ('wait for a page, p90, us', lambda m: m['latency_us']['p90']),
    ('wait for a page, p99, us', lambda m: m['latency_us']['p99']),
    ("guest's operations during post-copy, % of before",
     lambda m: 100 * m['ops_during'] / max(m['ops_before'], 1)),
    ('post-copy, s', lambda m: m['postcopy_s']),
    ('source QEMU but its vCPUs, s of CPU', lambda m: m['cpu_source_s']['others']),
    ('destination QEMU but its vCPUs, s of CPU',
     lambda m: m['cpu_destination_s']['others']),
    *((f'{what}: a processor for % of post-copy', busy(side, thread))
      for what, side, thread in (
          ('source, sends pages', 'source', 'src/main'),
          ('source, reads requests', 'source', 'src/return'),
          ('destination, reads pages', 'destination', 'dst/listen'),
          ('destination, reads pages that were asked for', 'destination',
           'dst/preempt'),
          ('destination, asks for the faults of userfaultfd', 'destination',
           'dst/fault'))),
]


def table(report, modes):
    """One table for each measure."""
    lines = [f'{report["kernel"]}, QEMU {report["qemu"]}, {report["memory"]}, '
             f'{report["touched_mib"]} MiB at work; median of {report["repeat"]}']
    for title, value in MEASURES:
        lines += ['', title, f'{"delay, us":>9} {"vCPUs":>5}'
                  + ''.join(f' {mode:>23}' for mode in modes)]
        lines += [f'{row["delay_us"]:9} {row["vcpus"]:5}' + ''.join(
            f' {value(row["median"][mode]):23.1f}' for mode in modes)
            for row in report['rows']]
    return '\n'.join(lines)


def draw(report, modes, path):
    """Pages on demand, p99 and the guest's speed, a column for each delay."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    delays = sorted({row['delay_us'] for row in report['rows']})
    shown = [MEASURES[0], MEASURES[3], MEASURES[4]]
    figure, axes = plt.subplots(len(shown), len(delays), squeeze=False,
                                sharey='row', figsize=(4.4 * len(delays), 9))
    for column, delay in enumerate(delays):
        rows = sorted((row for row in report['rows'] if row['delay_us'] == delay),
                      key=lambda row: row['vcpus'])
        for line, (title, value) in enumerate(shown):
            axis = axes[line][column]
            for mode, colour in zip(modes, COLOURS):
                axis.plot([row['vcpus'] for row in rows],
                          [value(row['median'][mode]) for row in rows],
                          marker='o', color=colour, label=mode)
            axis.set_xscale('log', base=2)
            axis.set_xticks([row['vcpus'] for row in rows])
            axis.get_xaxis().set_major_formatter(
                matplotlib.ticker.ScalarFormatter())
            axis.grid(axis='y', color='#cccccc', lw=0.6)
            if line == 0:
                axis.set_title(f'{delay} us of delay', fontsize=10)
            if column == 0:
                axis.set_ylabel(title.replace(', ', ',\n', 1), fontsize=9)
        axes[-1][column].set_xlabel('vCPUs')
    # Last: the columns of a line share what all of their curves need.
    for line in axes:
        line[0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='lower center', ncol=3,
                  frameon=False, fontsize=9)
    figure.suptitle(f'Post-copy of a guest at work, {report["memory"]}, '
                    f'{report["host_cpus"]} emulated processors a host',
                    fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
