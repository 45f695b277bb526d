# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest that is migrated: its QEMU's command line, and what it says."""

import json
import re
import threading
import time
from dataclasses import dataclass

from client import guest_ip_parameter
from errors import RigError, Timeout
from vhost import MTU, SHARE, TOP

PORTS = '/dev/virtio-ports/'
DISK_MIB = 8
TAP = 'tap0'        # qemu-job makes it


@dataclass(frozen=True)
class Guest:
    """What differs between guests. Paths are relative to TOP."""
    machines: tuple     # the default, and others
    cpu: str
    kernel_line: str    # always a part of it
    qemu: str           # runs in a virtual host of the same architecture
    initramfs: str


# A guest's kernel can hang in its clock's watchdog as a host's can: see vhost.py.
GUESTS = {
    'x86': Guest(('q35', 'pc', 'microvm,pcie=on'), 'max', 'console=ttyS0 tsc=nowatchdog',
                 'build/qemu/obj/qemu-system-x86_64',
                 'build/guest/initramfs.cpio'),
    'arm64': Guest(('virt,gic-version=3',), 'host', 'console=ttyAMA0',
                   'build/qemu/obj-arm64/qemu-system-aarch64',
                   'build/guest-arm64/initramfs.cpio'),
}


def kernel_line(arch, touched_mib):
    """A guest's kernel command line, which may have more after it."""
    return (f'{GUESTS[arch].kernel_line} quiet panic=-1 oops=panic '
            f'pagecheck.mib={touched_mib}')


# Kinds of guest memory: a -object for each backend. They share the guest's RAM
# evenly, but for PLUGGABLE.
_MEMFD = 'memory-backend-memfd,share=on'
_ANONYMOUS = 'memory-backend-ram'
_GUEST_MEMFD = 'memory-backend-guest-memfd'
_HUGETLB = 'memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M'
MEMORY = {
    'memfd': [_MEMFD],
    'anonymous': [_ANONYMOUS],
    'hugetlb': [_HUGETLB],
    'hugetlb-1g': [_HUGETLB.replace('=2M', '=1024M')],
    'hugetlb-private': [_HUGETLB.replace('share=on', 'share=off')],
    'tmpfs': ['memory-backend-file,share=on,mem-path=/dev/shm/'],
    'guest-memfd': [_GUEST_MEMFD],
    'guest-memfd-nodes': [f'{_GUEST_MEMFD},prealloc=on',
                          f'{_GUEST_MEMFD},host-nodes=0,policy=bind'],
    'mixed': [_MEMFD, _ANONYMOUS],
    'pluggable': [_MEMFD, _MEMFD, _ANONYMOUS],
    'pluggable-hugetlb': [_HUGETLB] * 3,
}
# The machine itself has half of the RAM, a DIMM and a virtio-mem device, which
# could have twice as much, a quarter each. The guest brings such memory into use
# by 128 MiB, and takes it before its own.
PLUGGABLE = ('pluggable', 'pluggable-hugetlb')
PLUGGABLE_MIB = 512

# Who serves the queues of the guest's NIC: nobody, QEMU, or the host's kernel.
NICS = {'none': None, 'virtio': 'vhost=off', 'vhost': 'vhost=on'}
# Likewise, of its disk: vhost-user is another process, which has mapped the guest's
# memory, too.
DISKS = ('none', 'virtio', 'vhost-user')
DISK = f'{SHARE}/disk.raw'
VHOST_USER_BLK = TOP / 'build/qemu/obj/contrib/vhost-user-blk/vhost-user-blk'
VHOST_USER_SOCKET = '/run/vhost-user-blk'


def huge_pages(scenario):
    """Kernel parameters of a host that has as many as the guest needs."""
    backends = MEMORY[scenario.memory]
    sizes = re.findall(r'hugetlbsize=(\d+)M', ' '.join(backends))
    if not sizes:
        return ''
    size = int(sizes[0])
    if scenario.memory in PLUGGABLE:
        # Also for what the virtio-mem device could have
        return f'hugepagesz={size}M hugepages={scenario.memory_mib * 5 // 4 // size + 8}'
    if scenario.memory_mib % (size * len(backends)):
        raise RigError(f'{scenario.memory_mib} MiB: {scenario.memory} memory comes in '
                       f'multiples of {size * len(backends)} MiB')
    # Some more, as nothing is known of how the backends use them.
    pages = scenario.memory_mib * len(sizes) // len(backends) // size + 16 // size
    return f'hugepagesz={size}M hugepages={pages}'


def memory_arguments(scenario):
    """-object, -m and what makes the backends the guest's memory."""
    backends = MEMORY[scenario.memory]
    if scenario.memory in PLUGGABLE:
        return pluggable_arguments(scenario, backends)
    size = scenario.memory_mib // len(backends)
    words = ['-m', f'{scenario.memory_mib}M']
    for number, backend in enumerate(backends):
        words += ['-object', f'{backend},id=ram{number},size={size}M']
    if len(backends) == 1:
        return [*words, '-M', 'memory-backend=ram0']
    for number in range(len(backends)):
        words += ['-numa', f'node,memdev=ram{number}']
    return words


def pluggable_arguments(scenario, backends):
    """The same of a guest with memory in devices."""
    if scenario.memory_mib % PLUGGABLE_MIB:
        raise RigError(f'{scenario.memory_mib} MiB: pluggable memory comes in '
                       f'multiples of {PLUGGABLE_MIB} MiB')
    quarter = scenario.memory_mib // 4
    sizes = 2 * quarter, quarter, 2 * quarter
    words = ['-m', f'{sizes[0]}M,slots=1,maxmem={sum(sizes)}M',
             '-M', 'memory-backend=ram0']
    for number, (backend, size) in enumerate(zip(backends, sizes)):
        words += ['-object', f'{backend},id=ram{number},size={size}M']
    return [*words, '-device', 'pc-dimm,id=dimm,memdev=ram1', '-device',
            f'virtio-mem-pci,id=vmem,memdev=ram2,requested-size={quarter}M']


def device_arguments(scenario):
    """The guest's NIC, at a bridge of the host's, its disk, and its balloon."""
    words = ['-device', 'virtio-balloon-pci'] if scenario.balloon else []
    if scenario.nic != 'none':
        words += ['-netdev', f'tap,id=net,ifname={TAP},script=no,downscript=no,'
                  + NICS[scenario.nic], '-device',
                  f'virtio-net-pci,netdev=net,romfile=,host_mtu={MTU}']
    if scenario.disk == 'virtio':
        words += ['-drive', f'file={DISK},format=raw,cache=none,if=none,id=disk',
                  '-device', 'virtio-blk-pci,drive=disk']
    elif scenario.disk == 'vhost-user':
        words += ['-chardev', f'socket,id=disk,path={VHOST_USER_SOCKET}',
                  '-device', 'vhost-user-blk-pci,chardev=disk']
    return words


# Of a program in front of QEMU: it may not open a userfaultfd, even as root.
_WITHOUT_USERFAULTFD = ('sh', '-c', 'rm -f /dev/userfaultfd; exec setpriv '
                        '--bounding-set=-sys_ptrace --inh-caps=-sys_ptrace "$@"', 'sh')


def qemu_command(scenario, host):
    """argv of the QEMU inside a virtual host, a or b; b waits for the guest.

    Its QMP, and the guest's own port, are ports of the virtual host, so that
    one process outside holds all the strings.
    """
    command = [
        # A shell of the host's architecture, not the one that qemu-job names
        'sh', str(TOP / 'rig/qemu-job'), str(scenario.delay_us), str(scenario.runs),
        '' if scenario.nic == 'none' else TAP,
        f'{VHOST_USER_BLK} -s {VHOST_USER_SOCKET} -b {DISK}'
        if scenario.disk == 'vhost-user' else '',
        *(_WITHOUT_USERFAULTFD if scenario.deny_userfaultfd and host == 'b' else ()),
        str(scenario.guest_qemu(host)), '-name', 'guest,debug-threads=on',
        '-nodefaults', '-no-user-config', '-no-reboot',
        '-display', 'none', '-L', str(scenario.guest_firmware),
        '-accel', accel(scenario, host), '-cpu', scenario.guest_cpu,
        '-M', scenario.machine, *memory_arguments(scenario),
        '-smp', str(scenario.vcpus),
        '-kernel', str(scenario.guest_kernel),
        '-initrd', str(scenario.initramfs),
        '-append', f'{kernel_line(scenario.arch, scenario.touched_mib)} '
        + ('' if scenario.nic == 'none' else guest_ip_parameter())
        # What goes into the balloon is touched, as it has to be zeros.
        + (' init_on_alloc=1' if scenario.balloon else '')
        # The pages that the guest works on, in a huge page that no device has part in
        + (' movablecore=1G' if scenario.memory == 'hugetlb-1g' else ''),
        '-serial', 'stdio',
        '-chardev', f'pipe,id=qmp,path={PORTS}qmp',
        '-mon', 'chardev=qmp,mode=control',
        '-device', 'virtio-serial-pci',
        '-chardev', f'pipe,id=guest,path={PORTS}guest',
        '-device', 'virtserialport,chardev=guest,name=guest',
        *device_arguments(scenario)]
    for event in scenario.trace:
        command += ['-trace', event]
    return command + (['-incoming', 'defer'] if host == 'b' else [])


def accel(scenario, host):
    """userfault= matters on a destination only, and not every QEMU knows it."""
    if host in scenario.userfault_known:
        return f'kvm,userfault={scenario.userfault}'
    return 'kvm'


class GuestFeed:
    """All that the guest reports, from whichever host it is on.

    reports holds (seconds, message) in order of arrival, the seconds being
    those of time.monotonic().
    """

    def __init__(self):
        self.reports = []
        self._arrived = threading.Condition()
        self._sockets = {}

    def listen(self, name, sock):
        """Read from the port of one host until it is gone."""
        self._sockets[name] = sock
        threading.Thread(target=self._read, args=(sock,), daemon=True).start()

    def _read(self, sock):
        rest = b''
        try:
            while data := sock.recv(65536):
                *lines, rest = (rest + data).split(b'\n')
                for line in lines:
                    self._take(line)
        except OSError:
            pass        # the host has been stopped

    def _take(self, line):
        try:
            message = json.loads(line)
        except ValueError:
            message = {'event': 'garbage', 'line': line[:200].decode('latin1')}
        with self._arrived:
            self.reports.append((time.monotonic(), message))
            self._arrived.notify_all()

    def send(self, name, command):
        """Give the guest a command, by the port of the host it is on."""
        self._sockets[name].sendall(command.encode() + b'\n')

    def wait_for(self, event, timeout, check=lambda: None, seen=0):
        """The first message of that kind; Timeout without one.

        check is called now and then, to raise what makes waiting pointless. The
        first so many reports that have been seen do not count.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            check()
            with self._arrived:
                for _, message in self.reports[seen:]:
                    if message['event'] == event:
                        return message
                seen = len(self.reports)
                self._arrived.wait(0.5)
        raise Timeout(f'the guest did not report "{event}" in {timeout:g} s')

    def forget_before(self, event):
        """What came before the newest such report is of a guest that is no more."""
        with self._arrived:
            while self.reports[0][1]['event'] != event or any(
                    message['event'] == event for _, message in self.reports[1:]):
                del self.reports[0]

    def save(self, path):
        """Write all reports, with the moments of their arrival."""
        path.write_text(''.join(f'{json.dumps([when, message])}\n'
                                for when, message in self.reports))

    @property
    def last(self):
        """The newest message that counts operations, or None."""
        for _, message in reversed(self.reports):
            if 'operations' in message:
                return message
        return None

    def rate(self, start, end):
        """Operations per second between two moments; 0 without reports."""
        points = [(when, message['operations'])
                  for when, message in list(self.reports)
                  if start <= when <= end and 'operations' in message]
        if len(points) < 2 or points[-1][0] == points[0][0]:
            return 0.0
        return ((points[-1][1] - points[0][1])
                / (points[-1][0] - points[0][0]))

    def check_monotonic(self):
        """Raise if the guest as a whole ever went back in time."""
        writes = [message['writes'] for _, message in list(self.reports)
                  if 'writes' in message]
        for before, after in zip(writes, writes[1:]):
            if after < before:
                raise RigError('the guest went back in time: '
                               f'{before} writes, then {after}')
