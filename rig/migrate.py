# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest at work moves between two virtual hosts by post-copy.

Scenario says what is wanted, Migration does it and gathers raw results;
report.py makes the report of them. Times are seconds unless a name says else.
"""

import re
import select
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from client import Client
from errors import RigError, Timeout, check_warnings
from guest import (DISK_MIB, GUESTS, VHOST_USER_BLK, GuestFeed, huge_pages,
                   qemu_command)
from monitor import Monitor, MonitorError, accel_properties
from vhost import TOP, Options, VirtualHost, address, pair_options, trio_options

PORT = 4444
SAMPLE_INTERVAL = 0.1
STACKS_LIMIT = 180      # seconds for gdb, in an emulator
STACKS_END = 'that is what each thread waits for'   # says qemu-job
TICKS = 100     # per second, in /proc/PID/stat
ENDED = ('completed', 'failed', 'cancelled')
BALLOON_MIB = 1         # each of its pages is asked for, the first time


@dataclass
class Scenario:
    """What to migrate, and how. Paths are those of the real machine.

    None stands for what the architecture has by default.
    """
    arch: str = 'x86'               # of hosts and guest
    machine: str = None             # the guest's: one of guest.GUESTS
    vcpus: int = 4
    memory: str = 'memfd'           # a key of guest.MEMORY
    memory_mib: int = 512
    touched_mib: int = 256
    userfault: str = 'auto'
    deny_userfaultfd: bool = False  # the destination may not use it
    preempt: bool = False
    precopy_percent: int = 0        # of RAM to send before post-copy starts
    bandwidth_mib: int = 0          # MiB/s of the background; 0: no limit
    queue_kib: int = 128            # of TCP buffers, see _network()
    delay_us: int = 0               # added to each packet, one way
    nic: str = 'none'               # of the guest's: one of guest.NICS
    disk: str = 'none'              # one of guest.DISKS; both hosts see it
    balloon: bool = False           # it is inflated and deflated in post-copy
    measure: float = 3              # of work before, and of work after
    timeout: float = 300            # of the migration, and of each wait
    qemu: Path = None               # the emulator of the hosts
    qemu_a: Path = None             # of the guest on the source
    qemu_b: Path = None             # and on the destination
    firmware: Path = field(default_factory=lambda: Options().firmware)
    kernel_a: Path = None
    kernel_b: Path = None
    host_disk: Path = None          # see Options.disk, of both hosts
    host_initrd: Path = None
    guest_kernel: Path = None
    guest_firmware: Path = None     # default: that of the hosts
    guest_cpu: str = None
    initramfs: Path = None
    host_cpus: int = 2
    host_threads: str = 'multi'
    host_memory: int = 0            # MiB; 0: what the guest needs, and some
    append: str = ''                # of the hosts' kernel command lines
    trace: tuple = ()               # trace events of the guest's QEMUs
    logs: Path = TOP / 'build/rig'
    runs: int = 1                   # of QEMU on each host, see qemu-job
    # Set by Migration: hosts whose QEMU knows -accel kvm,userfault=
    userfault_known: tuple = ()

    def __post_init__(self):
        """Paths must mean the same inside the hosts."""
        host, guest = Options(arch=self.arch), GUESTS[self.arch]
        for name, default in (
                ('machine', guest.machines[0]), ('guest_cpu', guest.cpu),
                ('qemu', host.qemu), ('kernel_a', host.kernel),
                ('kernel_b', host.kernel), ('guest_kernel', host.kernel),
                ('qemu_a', TOP / guest.qemu), ('qemu_b', TOP / guest.qemu),
                ('initramfs', TOP / guest.initramfs)):
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.guest_firmware is None:
            self.guest_firmware = self.firmware
        for name in ('qemu', 'qemu_a', 'qemu_b', 'firmware', 'kernel_a',
                     'kernel_b', 'host_disk', 'host_initrd', 'guest_kernel',
                     'guest_firmware', 'initramfs', 'logs'):
            if getattr(self, name) is not None:
                setattr(self, name, Path(getattr(self, name)).absolute())

    def guest_qemu(self, host):
        """The QEMU that the guest runs in on host a or b."""
        return {'a': self.qemu_a, 'b': self.qemu_b}[host]

    def host_options(self):
        """Options of the virtual hosts, and with a NIC those of a client, c."""
        memory = self.host_memory or self.memory_mib * 5 // 4 + 1024
        huge = huge_pages(self)
        if huge and not self.host_memory:
            memory += self.memory_mib
        common = Options(arch=self.arch, qemu=self.qemu, firmware=self.firmware,
                         cpus=self.host_cpus, memory=memory,
                         threads=self.host_threads,
                         append=f'{self._network()} {huge} {self.append}',
                         timeout=self.timeout,
                         log=self.logs / 'x.serial.log',
                         disk=self.host_disk, initrd=self.host_initrd,
                         share=self.logs / 'disk' if self.disk != 'none' else None,
                         bridge=self.nic != 'none',
                         pipes=('qmp', 'guest', 'stacks'))
        # c has only a client to run, and may be of another architecture.
        client = Options(cpus=1, memory=512, timeout=self.timeout,
                         log=common.log, pipes=('agent',))
        hosts = (pair_options(common) if self.nic == 'none'
                 else trio_options(common, client))
        hosts[0].kernel, hosts[1].kernel = self.kernel_a, self.kernel_b
        return {options.name: options for options in hosts}

    def _network(self):
        """Kernel parameters that keep the connection's queue short.

        A page that was asked for stands in line behind all that is in the
        buffers already. The kernel would let them grow to megabytes, which
        on this slow network is a good part of a second. Limiting QEMU's
        bandwidth instead makes it worse: QEMU 10.2 serves no request until
        the next 100 ms window once the limit is reached.
        """
        size = f'4096 16384 {self.queue_kib << 10}'
        return ' '.join(f'"sysctl.net.ipv4.{name}={size}"'
                        for name in ('tcp_wmem', 'tcp_rmem'))


def cpu_seconds(log):
    """Seconds of vCPU threads, of all others, and of each that migrates by name.

    From QEMU's log, lines of proc_pid_stat(5): first that of the process, which
    counts threads that have ended, too.
    """
    ticks = {}
    for line in re.findall(r'^qemu-stat: (.*)', log, flags=re.M):
        head, _, rest = line.rpartition(') ')
        words = rest.split()
        name = head.partition('(')[2]
        if not ticks:
            name = 'all'
        elif name.startswith('CPU '):
            name = 'vcpus'
        elif not name.startswith('mig/'):
            continue
        ticks[name] = ticks.get(name, 0) + int(words[11]) + int(words[12])
    if not ticks:
        return None
    ticks.setdefault('vcpus', 0)
    ticks['others'] = ticks.pop('all') - ticks['vcpus']
    return {name: count / TICKS for name, count in ticks.items()}


class Migration:
    """One run of a scenario; use once. run() returns the raw results.

    The guest moves from self.source to self.destination, which are names of
    hosts.
    """

    def __init__(self, scenario, progress):
        self.scenario = scenario
        self.progress = progress
        self.source, self.destination = 'a', 'b'
        self.port = PORT
        self.feed = GuestFeed()
        self.hosts = {}
        self.client = None      # with a NIC
        self.monitors = {}
        self.samples = []
        self.balloon = None     # the size that it was told to have, in bytes of RAM
        self.balloons = 0       # so many times it came to that in post-copy
        self.moments = {}       # name: time.monotonic()
        self.raw = {}

    def run(self):
        """Boot, migrate, verify. Raises RigError on anything but success.

        A guest that is wrong is no error here: it is in the results.
        """
        scenario = self.scenario
        self._check_qemu()
        scenario.logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self.feed.save, scenario.logs / 'guest.jsonl')
            try:
                self._boot(stack)
                self._fill()
                self._work()
            except (MonitorError, Timeout, OSError) as error:
                self._check_hosts()     # a dead host explains it better
                text = f'{error}\n{self._say_where()}'
                if not isinstance(error, Timeout):
                    raise RigError(text) from error
                self._print_stacks()
                self._print_processors()
                raise Timeout(text) from error
        self._check_logs()
        return self

    def _work(self):
        """What is done with a guest that is at work on the source."""
        self._measure('before')
        self._open_session()
        self._migrate()
        self._measure('after')
        self._close_session()
        self._verify()
        self._quit()

    def _check_qemu(self):
        scenario = self.scenario
        backend = [VHOST_USER_BLK] if scenario.disk == 'vhost-user' else []
        # What is on the hosts' own disk can't be seen.
        on_host = [] if scenario.host_disk else [
            scenario.guest_qemu('a'), scenario.guest_qemu('b'),
            scenario.guest_firmware, scenario.initramfs, scenario.guest_kernel]
        for path in (scenario.qemu, scenario.firmware, *on_host, *backend):
            if not Path(path).exists():
                raise RigError(f'{path} is missing: has it been built?')
        # A QEMU of another architecture, or there, can't be asked here, and is ours.
        scenario.userfault_known = tuple(
            host for host in 'ab' if scenario.arch != 'x86' or scenario.host_disk or
            'userfault' in accel_properties(scenario.guest_qemu(host),
                                            scenario.guest_firmware))
        if scenario.userfault == 'on' and 'b' not in scenario.userfault_known:
            raise RigError(f'{scenario.guest_qemu("b")} has no '
                           '-accel kvm,userfault=')

    # Starting

    def _boot(self, stack):
        self.progress.step('booting two virtual hosts')
        self._make_disk()
        options_of = self.scenario.host_options()
        if 'c' in options_of:
            self.client = stack.enter_context(Client(options_of.pop('c')))
        for name, options in options_of.items():
            path = self._guest_log(name)
            path.unlink(missing_ok=True)
            log = stack.enter_context(open(path, 'ab', 0))
            command = qemu_command(self.scenario, name)
            self.hosts[name] = stack.enter_context(
                VirtualHost(options, command, log.write))
        for name, host in self.hosts.items():
            self.feed.listen(name, host.sockets['guest'])
        for name in self.hosts:
            self._connect(name)
        stack.callback(lambda: [m.close() for m in self.monitors.values()])

    def _make_disk(self):
        if self.scenario.disk != 'none':
            folder = self.scenario.logs / 'disk'
            folder.mkdir(exist_ok=True)
            with open(folder / 'disk.raw', 'wb') as image:
                image.truncate(DISK_MIB << 20)

    def _connect(self, name):
        """Get hold of a QEMU that has been started, and prepare it."""
        sock = self.hosts[name].sockets['qmp']
        self._await_greeting(name, sock)
        self.monitors[name] = Monitor(f'QEMU on {name}', sock)
        self._prepare(self.monitors[name])

    def _await_greeting(self, name, sock):
        end = time.monotonic() + self.scenario.timeout
        while not select.select([sock], [], [], 0.2)[0]:
            self._check_hosts()
            if time.monotonic() > end:
                raise Timeout(f'no QMP greeting from host {name}',
                              self.hosts[name].options.log)

    def _prepare(self, monitor):
        capabilities = ['postcopy-ram', 'postcopy-blocktime', 'events']
        if self.scenario.preempt:
            capabilities.append('postcopy-preempt')
        limit = self.scenario.bandwidth_mib << 20
        monitor('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': True} for name in capabilities])
        monitor('migrate-set-parameters', max_postcopy_bandwidth=limit,
                max_bandwidth=limit or 1 << 40)

    def _uri(self):
        """Where the destination listens: at another port each time."""
        self.port += 1
        return f'tcp:{address(self.destination)}:{self.port}'

    def _fill(self):
        self.progress.step('booting the guest on a, filling its memory')
        self.raw['filled'] = self.feed.wait_for(
            'filled', self.scenario.timeout, self._check_hosts)
        self.feed.wait_for('working', self.scenario.timeout,
                           self._check_hosts)

    # The migration

    def _measure(self, phase):
        """Let the guest work for a while and sample nothing but it."""
        self._mark(f'{phase}_start')
        end = time.monotonic() + self.scenario.measure
        while time.monotonic() < end:
            self._check_hosts()
            self.progress.update(f'guest at work {phase} the migration: '
                                 f'{self._operations_now():.0f} operations/s')
            time.sleep(SAMPLE_INTERVAL)
        self._mark(f'{phase}_end')

    def _migrate(self):
        self.progress.step(f'migrating, userfault={self.scenario.userfault}')
        self._mark('start')
        uri = self._uri()
        self.monitors[self.destination]('migrate-incoming', uri=uri)
        self.monitors[self.source]('migrate', uri=uri)
        end = time.monotonic() + self.scenario.timeout
        while not self._sample():
            if time.monotonic() > end:
                raise Timeout('the migration did not complete in '
                              f'{self.scenario.timeout:g} s')
            time.sleep(SAMPLE_INTERVAL)
        self._mark('end')
        self.raw['source'] = self.monitors[self.source]('query-migrate')
        self.raw['destination'] = self.monitors[self.destination](
            'query-migrate')
        self.raw['version'] = self.monitors[self.destination]('query-version')

    def _sample(self):
        """Take one sample and act on it. True once both sides completed."""
        source = self.monitors[self.source]('query-migrate')
        self._start_postcopy(source)
        destination = self.monitors[self.destination]('query-migrate')
        self._check_hosts()
        sample = self._make_sample(source, destination)
        self.samples.append(sample)
        self._show(sample)
        if self.scenario.balloon and sample['destination_status'] == 'postcopy-active':
            self._move_balloon()
        return self._ended(source, destination)

    def _ended(self, source, destination):
        """Whether both sides completed. RigError if it ended in another way."""
        for side in (source, destination):
            if side.get('status') in ('failed', 'cancelled', 'postcopy-paused'):
                raise RigError(f'migration {side["status"]}: '
                               f'{side.get("error-desc", "no reason given")}\n'
                               + self._log_names())
        return (source.get('status') == 'completed'
                and destination.get('status') == 'completed')

    def _start_postcopy(self, source):
        if 'postcopy' in self.moments or source.get('status') != 'active':
            return
        ram = source.get('ram', {})
        sent = ram.get('total', 0) - ram.get('remaining', 0)
        if sent * 100 >= self.scenario.precopy_percent * ram.get('total', 1):
            self.monitors[self.source]('migrate-start-postcopy')
            self._mark('postcopy')

    def _move_balloon(self):
        """Inflate the balloon, if it is empty, or deflate it, if it is full.

        The pages in it must not be discarded, as they have arrived already. The
        guest touches them the next time.
        """
        destination = self.monitors[self.destination]
        empty = self.scenario.memory_mib << 20
        full = empty - (BALLOON_MIB << 20)
        size = destination('query-balloon')['actual']
        if self.balloon is None:
            self.balloon = size
        elif size == self.balloon:
            self.balloons += 1
        else:
            return
        self.balloon = full if size == empty else empty
        destination('balloon', value=self.balloon)

    def _make_sample(self, source, destination):
        ram = source.get('ram', {})
        userfault = destination.get('kvm-userfault', {})
        return {
            't': time.monotonic(),
            'status': source.get('status', 'none'),
            'destination_status': destination.get('status', 'none'),
            'operations': (self.feed.last or {}).get('operations', 0),
            'pages_left': ram.get('remaining', 0) // ram.get('page-size', 4096),
            'page_requests': ram.get('postcopy-requests', 0),
            'userfault_exits': userfault.get('exits', 0),
            'userfault_requests': userfault.get('requests', 0),
            'bytes_sent': ram.get('transferred', 0),
        }

    def _show(self, sample):
        earlier = next((old for old in reversed(self.samples[:-1])
                        if sample['t'] - old['t'] >= 0.8), self.samples[0])
        span = sample['t'] - earlier['t']
        key = 'userfault_exits' if sample['userfault_exits'] else 'page_requests'
        rate = (sample[key] - earlier[key]) / span if span else 0
        what = 'exits' if key == 'userfault_exits' else 'page requests'
        self.progress.update(
            f'{sample["status"]:16} {sample["pages_left"]:7d} pages left, '
            f'{rate:6.0f} {what}/s, {self._operations_now():7.0f} operations/s')

    def _operations_now(self):
        now = time.monotonic()
        return self.feed.rate(now - 1, now)

    def _mark(self, name):
        self.moments[name] = time.monotonic()

    def _verify(self):
        self.progress.step('verifying every page')
        seen = len(self.feed.reports)
        self.feed.send(self.destination, 'verify')
        self.raw['verified'] = self.feed.wait_for(
            'verified', self.scenario.timeout, self._check_hosts, seen)
        self.feed.check_monotonic()

    def _open_session(self):
        if self.client:
            self.client.open_session()

    def _close_session(self):
        if self.client:
            self.raw['session'] = self.client.close_session()

    def _quit(self):
        """End both QEMUs in order: they say what processor time they took."""
        self._check_hosts()
        for name, monitor in self.monitors.items():
            monitor('quit')
            status = self.hosts[name].wait()
            if status:
                raise RigError(f'QEMU on {name} ended with status {status} when '
                               f'told to quit; its log: {self._guest_log(name)}')
            self.raw[f'cpu_{name}'] = cpu_seconds(
                self._guest_log(name).read_text('utf-8', 'replace'))
        if self.client:
            self.client.power_off()

    # Failures

    def _check_hosts(self):
        """Raise if a host is lost or its QEMU, the job, has ended."""
        for name, host in self.hosts.items():
            host.check()
            if host.status is not None:
                log = self._guest_log(name)
                tail = log.read_text('utf-8', 'replace').splitlines()[-8:]
                raise RigError(f'QEMU on {name} ended with status '
                               f'{host.status}; its log: {log}',
                               host.options.log, tail)

    def _print_stacks(self):
        """Have what each thread of both QEMUs is doing in their logs."""
        self.progress.step('asking what both QEMUs are doing')
        for host in self.hosts.values():
            host.sockets['stacks'].sendall(b'\n')
        end = time.monotonic() + STACKS_LIMIT
        while time.monotonic() < end and not all(
                STACKS_END in self._guest_log(name).read_text(errors='replace')
                for name, host in self.hosts.items() if host.running):
            time.sleep(1)

    def _print_processors(self):
        """Have the guest's processors in the logs of both QEMUs, twice.

        A guest that does not get on may have one that halted, with an interrupt
        pending that it was not told of. On x86 they get an NMI after that, which
        wakes it: if the guest gets on then, it was a lost wake-up.
        """
        look = ['info registers -a']
        commands = look * 2
        if self.scenario.arch == 'x86':
            look += [f'info lapic {cpu}' for cpu in range(self.scenario.vcpus)]
            commands = [*look, *look, 'nmi', *look]
        for name, monitor in self.monitors.items():
            with suppress(MonitorError, Timeout), \
                    open(self._guest_log(name), 'a', encoding='utf-8') as log:
                for command in commands:
                    print(f'(qemu) {command}', file=log)
                    print(monitor('human-monitor-command', command_line=command),
                          file=log, flush=True)

    def _say_where(self):
        """How far it came, and where more is written."""
        last = self.samples[-1] if self.samples else 'there was no migration yet'
        return f'the last sample: {last}\n{self._log_names()}'

    def _check_logs(self):
        for name, host in self.hosts.items():
            check_warnings(host.options.log, f'host {name}')
            check_warnings(self._guest_log(name), f'guest on {name}')

    def _guest_log(self, name):
        return self.scenario.logs / f'{name}.guest.log'

    def _log_names(self):
        return '\n'.join(f'log: {path}' for name, host in self.hosts.items()
                         for path in (host.options.log, self._guest_log(name)))
