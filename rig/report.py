# SPDX-License-Identifier: GPL-2.0-or-later
"""From the raw results of a migration to a report, and from that to a table.

Names of members end in their unit; counts have none. What a QEMU without
KVM Userfault does not know is 0 or null.
"""

import json
import os
import platform
import re

PAGE = 4096


def make_report(migration):
    """The report as a dict that goes into report.json as it is."""
    scenario = migration.scenario
    report = {'status': migration.raw['source']['status'],
              'qemu': _qemu_version(migration), **_scenario(scenario)}
    report.update(_timing(migration))
    report.update(_pages(migration))
    report.update(_guest(migration))
    report.update(_rates(migration, report))
    report['balloons'] = migration.balloons
    report['moments'] = _relative(migration)
    report['samples'] = _series(migration)
    report['guest_reports'] = _operations(migration)
    report['raw'] = {side: migration.raw[side]
                     for side in ('source', 'destination')}
    return report


def _scenario(scenario):
    return {
        'kernel': _kernel_version(scenario.kernel_b),
        'kernel_source': _kernel_version(scenario.kernel_a),
        'arch': scenario.arch,
        'machine_type': scenario.machine,
        'vcpus': scenario.vcpus,
        'memory': scenario.memory,
        'memory_mib': scenario.memory_mib,
        'touched_mib': scenario.touched_mib,
        'userfault': scenario.userfault,
        'preempt': scenario.preempt,
        'nic': scenario.nic,
        'delay_us': scenario.delay_us,
        'host_cpus': scenario.host_cpus,
        'host_threads': scenario.host_threads,
        'machine': {'cpus': os.cpu_count(), 'arch': platform.machine(),
                    'processor': _processor()},
    }


def _kernel_version(image):
    """The version string in a bzImage's header, at the offset it names.

    An arm64 Image has none there, but says it when it boots.
    """
    with open(image, 'rb') as stream:
        header = stream.read(0x8000)
        if header[0x202:0x206] != b'HdrS':
            banner = re.search(rb'Linux version (\S+)', stream.read())
            return banner[1].decode('ascii', 'replace') if banner else str(image)
    start = int.from_bytes(header[0x20e:0x210], 'little') + 0x200
    return header[start:start + 200].split(b'\0')[0].decode('ascii', 'replace')


def _qemu_version(migration):
    """Of the destination, which is asked because it may not run here."""
    version = migration.raw['version']
    return '{major}.{minor}.{micro}'.format(**version['qemu']) + version['package']


def _processor():
    with open('/proc/cpuinfo', encoding='utf-8') as stream:
        names = [line.partition(':')[2].strip() for line in stream
                 if line.startswith('model name')]
    return names[0] if names else 'unknown'


def _timing(migration):
    source = migration.raw['source']
    return {'downtime_ms': source.get('downtime'),
            'total_ms': source.get('total-time')}


def _pages(migration):
    """Pages by way, and how long a fault took."""
    destination = migration.raw['destination']
    userfault = destination.get('kvm-userfault')
    total = migration.raw['source']['ram']['total'] // PAGE
    if userfault:
        pages = _userfault_counts(userfault)
        waits = userfault.get('latency-dist', [])
        if not userfault.get('enabled'):
            waits = destination.get('postcopy-latency-dist', waits)
    else:
        pages = _blocktime_counts(destination)
        waits = destination.get('postcopy-latency-dist', [])
    on_demand = (pages['userfault_requests'] + pages['userfaultfd_vcpu_faults']
                 + pages['userfaultfd_other_faults'])
    return {**pages, 'pages_total': total,
            'pages_background': max(0, total - on_demand),
            'latency_us': {f'p{part}': percentile(waits, part)
                           for part in (50, 90, 99)},
            'latency_dist': waits}


def _userfault_counts(userfault):
    return {
        'userfault_enabled': userfault.get('enabled', False),
        'userfault_exits': userfault.get('exits', 0),
        'userfault_exits_resolved': userfault.get('resolved', 0),
        'userfault_exits_mapped': userfault.get('mapped', 0),
        'userfault_requests': userfault.get('requests', 0),
        'userfault_pages': userfault.get('pages', 0),
        'userfault_maps': userfault.get('maps', 0),
        'userfault_wait_us': userfault.get('wait-ns', 0) // 1000,
        'userfaultfd_vcpu_faults': userfault.get('uffd-vcpu-faults', 0),
        'userfaultfd_other_faults': userfault.get('uffd-other-faults', 0),
        'userfault_fallback': userfault.get('fallback', []),
    }


def _blocktime_counts(destination):
    """The same from an unpatched QEMU, which gives averages per vCPU.

    A vCPU's count is its time blocked over its average, so it is near, not
    exact; the total is exact.
    """
    total = sum(destination.get('postcopy-latency-dist', []))
    vcpu = sum(round(blocked_ms * 1e6 / average) for blocked_ms, average in
               zip(destination.get('postcopy-vcpu-blocktime', []),
                   destination.get('postcopy-vcpu-latency', [])) if average)
    vcpu = min(vcpu, total)
    return {
        'userfault_enabled': False, 'userfault_exits': 0,
        'userfault_exits_resolved': 0, 'userfault_exits_mapped': 0,
        'userfault_requests': 0,
        'userfault_pages': 0, 'userfault_maps': 0,
        'userfault_wait_us': 0, 'userfaultfd_vcpu_faults': vcpu,
        'userfaultfd_other_faults': total - vcpu, 'userfault_fallback': [],
    }


def percentile(counts, part):
    """Microseconds that part percent of the waits do not exceed, or None.

    counts[n] is the number of waits from 2**n to 2**(n+1) microseconds;
    within a bucket they are taken to be spread evenly.
    """
    wanted = sum(counts) * part / 100
    below = 0
    for bucket, count in enumerate(counts):
        if count and below + count >= wanted:
            return round(2 ** bucket * (1 + (wanted - below) / count))
        below += count
    return None


def _rates(migration, report):
    """Pages on demand per second of post-copy, and what QEMU's threads took."""
    moments = migration.moments
    seconds = moments['end'] - moments.get('postcopy', moments['start'])
    demand = report['userfault_requests'] + report['userfaultfd_vcpu_faults']
    if not report['userfault_enabled']:
        # Asynchronous page faults make most of the vCPUs' those of others.
        demand += report['userfaultfd_other_faults']
    return {'postcopy_s': round(seconds, 3),
            'demand_per_s': round(demand / seconds, 1),
            'cpu_source_s': migration.raw['cpu_a'],
            'cpu_destination_s': migration.raw['cpu_b']}


def _guest(migration):
    moments, feed = migration.moments, migration.feed
    verified = migration.raw['verified']
    return {
        'pages_corrupt': verified['wrong'],
        'pages_wrong': verified['wrong_pages'],
        'pages_verified': verified['pages'],
        'writes_lost': verified['lost'],
        'blocks_verified': verified.get('blocks', 0),
        'blocks_wrong': verified.get('wrong_blocks', 0),
        'session': migration.raw.get('session'),
        'ops_before': round(feed.rate(moments['before_start'],
                                      moments['before_end'])),
        'ops_during': round(feed.rate(moments['start'], moments['end'])),
        'ops_after': round(feed.rate(moments['after_start'],
                                     moments['after_end'])),
    }


def _relative(migration):
    start = migration.moments['start']
    return {f'{name}_s': round(when - start, 3)
            for name, when in migration.moments.items()}


def _series(migration):
    start = migration.moments['start']
    return [{'t_s': round(sample['t'] - start, 3),
             **{key: value for key, value in sample.items() if key != 't'}}
            for sample in migration.samples]


def _operations(migration):
    """[seconds since the start, operations so far], for the picture.

    The guest's own clock says when: a report may wait in the guest for a page
    of its own. The clock stood still at the switch, so that what comes later
    is early by the downtime.
    """
    reports = [(when, message['ns'] / 1e9, message['operations'])
               for when, message in migration.feed.reports
               if 'operations' in message]
    offset = min((when - clock for when, clock, _ in reports), default=0)
    offset -= migration.moments['start']
    return [[round(clock + offset, 3), operations]
            for _, clock, operations in reports]


def good(report):
    """Whether the migration did what it should."""
    session = report['session']
    return (report['status'] == 'completed' and report['pages_corrupt'] == 0
            and report['writes_lost'] == 0 and report['blocks_wrong'] == 0
            and not (session and session['error']))


def write(report, path):
    """Write the JSON in one piece: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + '.new')
    new.write_text(json.dumps(report, indent=1) + '\n')
    new.replace(path)


def table(report):
    """What happened, for people."""
    latency = report['latency_us']
    rows = [
        ('status', report['status']),
        ('kernel', report['kernel'].partition(' ')[0]),
        ('QEMU', report['qemu']),
        ('guest', f'{report["vcpus"]} vCPUs, {report["memory_mib"]} MiB of '
                  f'{report["memory"]} memory, '
                  f'{report["touched_mib"]} MiB touched'),
        ('userfault', f'{report["userfault"]}, '
         + ('in use' if report['userfault_enabled'] else 'not in use')),
        ('downtime', f'{report["downtime_ms"]} ms'),
        ('total time', f'{report["total_ms"]} ms'),
        None,
        ('pages in all', report['pages_total']),
        ('  background', report['pages_background']),
        ('  userfault requests', report['userfault_requests']),
        ('  userfaultfd, vCPUs', report['userfaultfd_vcpu_faults']),
        ('  userfaultfd, others', report['userfaultfd_other_faults']),
        ('userfault exits', f'{report["userfault_exits"]}, of which '
         f'{report["userfault_exits_mapped"]} mapped what had arrived, '
         f'{report["userfault_exits_resolved"]} found it mapped'),
        ('  put in place', f'{report["userfault_pages"]} pages, with '
         f'{report["userfault_maps"]} calls to map them'),
        ('wait for a page', ', '.join(
            f'{name} {value} us' for name, value in latency.items())),
        None,
        ('guest operations/s', f'{report["ops_before"]} before, '
         f'{report["ops_during"]} during, {report["ops_after"]} after'),
        ('pages verified', report['pages_verified']),
        ('corrupt pages', report['pages_corrupt']),
        ('lost writes', report['writes_lost']),
    ]
    if report['blocks_verified']:
        rows.append(('blocks of the disk', f'{report["blocks_verified"]}, '
                     f'{report["blocks_wrong"]} wrong'))
    if session := report['session']:
        rows.append((f'TCP session, {report["nic"]}', session['error'] or
                     f'{session["replies"]} replies, the longest wait '
                     f'{session["longest_ms"]} ms'))
    return '\n'.join(f'{row[0]:<22} {row[1]}' if row else '' for row in rows)
