# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual host: a machine booted in an emulator with KVM in it.

Its root is the real machine's own, or a disk on which files that the rig names have
the same paths.

The emulator runs in TCG and emulates AMD's SVM or arm64's EL2, so the KVM inside
is the real one. Nothing that runs in the host can write to the machine, apart from the
folder it shares. All times are in seconds, memory is in MiB.
"""

import functools
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import tsc
from errors import RigError, Timeout, check_warnings, from_log, read_lines

TOP = Path(__file__).resolve().parent.parent
NETWORK = '10.77.0.'
MTU = 9000
SHARE = '/run/results'
ICOUNT_KHZ = 1000000
GRACE = 20      # from a host's last word to its power-off


@dataclass(frozen=True)
class Architecture:
    """What differs between virtual hosts. Paths are relative to TOP.

    The kernel's has a place for a variant of it, as in "-kasan".
    """
    machine: tuple      # options of the emulator
    console: str
    qemu: str
    kernel: str
    # Programs for init and its job, if the machine's own can't run there.
    userland: str = ''


ARCHITECTURES = {
    'x86': Architecture(
        # Without the fast "rep movsb": emulated, it takes a step for each byte.
        ('-M', 'q35', '-cpu', 'max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off'),
        'ttyS0',
        'build/qemu/obj/qemu-system-x86_64',
        'build/linux/obj{}/arch/x86/boot/bzImage'),
    'arm64': Architecture(
        ('-M', 'virt,virtualization=on,gic-version=3', '-cpu', 'max'),
        'ttyAMA0', 'build/qemu/obj/qemu-system-aarch64',
        'build/linux/obj-arm64{}/arch/arm64/boot/Image',
        'build/userland-arm64/bin'),
}


def _default(variable, path):
    return Path(os.environ.get(variable, TOP / path))


@dataclass
class Options:
    """How to boot one virtual host. Paths are those of the real machine."""
    name: str = 'vhost'
    arch: str = 'x86'               # one of ARCHITECTURES
    variant: str = ''               # of the kernel: linux/config/variants
    qemu: Path = None               # default: RIG_QEMU, or by arch
    kernel: Path = None             # default: RIG_KERNEL, or by arch, variant
    firmware: Path = field(default_factory=lambda: _default(
        'RIG_FIRMWARE', 'build/firmware'))
    cpus: int = 2
    # 'multi': each processor has a thread of the emulator. 'single': they run in
    # turn, in one. 'icount': so, and the clock is the number of instructions, one
    # each nanosecond, whatever else the machine does.
    threads: str = 'multi'
    memory: int = 2048
    append: str = ''                # more of the kernel command line
    timeout: float = 600
    log: Path = None                # serial log; default build/rig/NAME.serial.log
    layer: Path = None              # folder laid over the root
    disk: Path = None               # the root, in place of the machine's own: ext4
    initrd: Path = None             # that finds it; not needed for a rig's kernel
    share: Path = None              # folder seen read-write at SHARE
    ports: dict = field(default_factory=dict)   # name: path of a unix socket
    pipes: tuple = ()               # names of ports for VirtualHost.sockets
    ip: str = ''                    # with net or hub: address/prefix of eth0
    net: socket.socket = None       # one end of join()
    hub: tuple = ()                 # ends of join(): cables that meet here
    bridge: bool = False            # eth0 is a port of br0, which has the address
    environment: dict = field(default_factory=dict)
    cwd: str = '/'

    def __post_init__(self):
        arch = ARCHITECTURES[self.arch]
        if self.qemu is None:
            self.qemu = _default('RIG_QEMU', arch.qemu)
        if self.kernel is None:
            self.kernel = _default('RIG_KERNEL', arch.kernel.format(
                self.variant and f'-{self.variant}'))
        if self.log is None:
            self.log = TOP / 'build/rig' / f'{self.name}.serial.log'


@functools.cache
def _clock(arch, icount):
    """One frequency for all hosts, see tsc.py. arm64's is fixed.

    And no watchdog, which keeps Linux 7.3 from booting now and then: it waits
    for another processor that waits for its lock, and there is no time yet that
    goes on and lets it give up.
    """
    if arch != 'x86':
        return ''
    khz = ICOUNT_KHZ if icount else tsc.frequency_khz()
    return 'tsc=nowatchdog' + (f' tsc_early_khz={khz}' if khz else '')


def join():
    """Two ends of a network cable, for the `net` of two hosts."""
    return socket.socketpair()


def address(name):
    """That of host a, b or c."""
    return f'{NETWORK}{"abc".index(name) + 1}'


def _on_network(options, name, **more):
    log = Path(options.log).with_name(f'{name}.serial.log')
    return replace(options, name=name, ip=f'{address(name)}/24', log=log, **more)


def pair_options(options):
    """The options of two hosts, a and b, on a network of their own."""
    return [_on_network(options, name, net=end)
            for name, end in zip('ab', join())]


def trio_options(options, third):
    """The same, with a third host, c, whose emulator is the hub between them.

    What a and b send each other costs no processor of c's.
    """
    cables = [join() for _ in 'ab']
    hosts = [_on_network(options, name, net=end)
             for name, (end, _) in zip('ab', cables)]
    return [*hosts, _on_network(third, 'c', hub=tuple(end for _, end in cables))]


class VirtualHost:
    """Boots a host and runs one command in it; a context manager.

    Leaving the context, or the death of this process, ends the emulator.
    """

    def __init__(self, options, argv, sink=None):
        """sink is called, in a thread of its own, with bytes of output."""
        self.options = options
        self.argv = [str(arg) for arg in argv]
        self.sink = sink or (lambda data: None)
        self.sockets = {}
        self.status = None
        self._process = None
        self._threads = []
        self._pass = []         # what the emulator inherits

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc):
        self.stop()

    # Starting

    def start(self):
        """Power the host on. RigError if a file it needs is missing."""
        options = self.options
        userland = TOP / ARCHITECTURES[options.arch].userland
        for path in (options.qemu, options.kernel, options.firmware, userland,
                     options.disk, options.initrd):
            if path and not Path(path).exists():
                raise RigError(f'{path} is missing: has it been built?')
        Path(options.log).parent.mkdir(parents=True, exist_ok=True)
        Path(options.log).write_bytes(b'')
        output, status = self._pipe('rig.out'), self._pipe('rig.status')
        for name in options.pipes:
            self.sockets[name] = self._pipe(name)
        self._spawn(self._command())
        self._read(output, self.sink)
        self._read(status, self._take_status)

    def _pipe(self, name):
        """Our end of a new port. The emulator inherits the other one."""
        ours, theirs = socket.socketpair()
        self._pass.append((name, theirs))
        return ours

    def _spawn(self, command):
        """Start the emulator in such a way that it dies with us."""
        cables = [end for end in (self.options.net, *self.options.hub) if end]
        fds = [end.fileno() for _, end in self._pass]
        fds += [end.fileno() for end in cables]
        files = [self._fw_cfg('job', self._job()),
                 self._fw_cfg('setup', self._setup())]
        for fd, arguments in files:
            fds.append(fd)
            command += arguments
        log = open(Path(self.options.log).with_suffix('.qemu'), 'wb')
        with log:
            self._process = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL', *command], pass_fds=fds,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for fd, _ in files:
            os.close(fd)
        for _, end in self._pass:
            end.close()
        for end in cables:
            end.close()

    @staticmethod
    def _fw_cfg(name, text):
        """A file in the machine's firmware configuration: (fd, arguments)."""
        fd = os.memfd_create(name)
        os.write(fd, text.encode())
        return fd, ['-fw_cfg', f'name=opt/rig/{name},file=/proc/self/fd/{fd}']

    def _job(self):
        """The script that init runs: environment, folder, command."""
        lines = [f'export {name}={shlex.quote(str(value))}'
                 for name, value in self.options.environment.items()]
        lines.append(f'cd {shlex.quote(str(self.options.cwd))} || exit 126')
        lines.append('exec ' + shlex.join(self.argv))
        return '\n'.join(lines) + '\n'

    def _setup(self):
        """The variables that init reads."""
        options = self.options
        return (f'RIG_NAME={shlex.quote(options.name)}\n'
                f'RIG_IP={options.ip if options.net or options.hub else ""}\n'
                f'RIG_BRIDGE={"yes" if options.bridge else ""}\n'
                f'RIG_SHARE={SHARE if options.share else ""}\n')

    def _command(self):
        options = self.options
        arch = ARCHITECTURES[options.arch]
        command = [
            str(options.qemu), '-nodefaults', '-no-user-config', '-no-reboot',
            '-d', 'cpu_reset', '-display', 'none', '-L', str(options.firmware),
            *arch.machine,
            *self._accel(),
            '-smp', str(options.cpus), '-m', f'{options.memory}M',
            '-kernel', str(options.kernel),
            '-append', self._kernel_line(arch),
            '-chardev', f'file,id=serial,path={options.log}',
            '-serial', 'chardev:serial', '-device', 'virtio-rng-pci',
            '-device', 'virtio-serial-pci,max_ports=31']
        if options.disk:
            command += ['-drive', f'file={options.disk},format=raw,if=virtio,'
                        'snapshot=on']
        else:
            command += self._shared_folder('root', '/', ',readonly=on')
        if options.initrd:
            command += ['-initrd', str(options.initrd)]
        if options.share:
            command += self._shared_folder('share', options.share)
        for name, end in self._pass:
            command += self._port(name, f'fd={end.fileno()}')
        for name, path in options.ports.items():
            command += self._port(name, f'path={path},server=on,wait=off')
        return command + self._network()

    def _accel(self):
        if self.options.threads == 'icount':
            # Idle time is skipped: nobody waits for it.
            return ['-accel', 'tcg,thread=single', '-icount', 'shift=0,sleep=off']
        return ['-accel', f'tcg,thread={self.options.threads}']

    def _kernel_line(self, arch):
        """init, a script, needs a shell of the host's architecture."""
        layer = (f'RIG_LAYER={Path(self.options.layer).absolute()} '
                 if self.options.layer else '')
        init = f'{layer}init={TOP}/rig/init'
        if arch.userland:
            path = TOP / arch.userland
            init = f'{layer}RIG_PATH={path} init={path}/sh -- {TOP}/rig/init'
        root = ('root=/dev/vda rootfstype=ext4 ro' if self.options.disk else
                'root=root rootfstype=9p ro rootflags='
                'trans=virtio,version=9p2000.L,cache=loose,msize=512000')
        if self.options.initrd:
            root += ' net.ifnames=0'    # eth0, whatever udev thinks
        return (f'console={arch.console} {root} panic=-1 oops=panic '
                f'{_clock(self.options.arch, self.options.threads == "icount")} '
                f'{self.options.append} {init}')

    @staticmethod
    def _shared_folder(tag, path, more=''):
        return ['-fsdev', f'local,id={tag},path={path},security_model=none,'
                f'multidevs=remap{more}',
                '-device', f'virtio-9p-pci,fsdev={tag},mount_tag={tag}']

    @staticmethod
    def _port(name, socket_options):
        return ['-chardev', f'socket,id={name},{socket_options}',
                '-device', f'virtserialport,chardev={name},name={name}']

    def _network(self):
        """eth0; jumbo frames, because each packet costs an emulated exit."""
        options = self.options
        words = []
        if options.net:
            words = self._cable('net', options.net)
        elif options.hub:
            for number, end in enumerate(options.hub):
                words += [*self._cable(f'cable{number}', end), '-netdev',
                          f'hubport,id=port{number},hubid=0,netdev=cable{number}']
            words += ['-netdev', 'hubport,id=net,hubid=0']
        if not words:
            return []
        mac = f'52:54:00:77:00:{int(options.ip.split("/")[0].split(".")[3]):02x}'
        return [*words, '-device', 'virtio-net-pci,netdev=net,romfile=,'
                f'host_mtu={MTU},mac={mac}']

    @staticmethod
    def _cable(name, end):
        return ['-netdev', f'stream,id={name},server=off,addr.type=fd,'
                f'addr.str={end.fileno()}']

    # Running

    def _read(self, end, consume):
        thread = threading.Thread(target=self._read_all, args=(end, consume),
                                  daemon=True)
        thread.start()
        self._threads.append(thread)

    @staticmethod
    def _read_all(end, consume):
        with end:
            while data := end.recv(65536):
                consume(data)

    def _take_status(self, data):
        self.status = int(data)

    @property
    def running(self):
        """Whether the emulator is there and no status has arrived."""
        return self.status is None and self._process.poll() is None

    def wait(self, timeout=None):
        """The command's exit status, once the host is off.

        Raises Timeout, Panic, LostVM, or KernelWarning (also when the
        command succeeded). timeout defaults to that of the options.
        """
        limit = self.options.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        while self.running and time.monotonic() < end:
            time.sleep(0.05)
        if self.running:
            self.stop()
            raise Timeout(f'{self.what}: not done after {limit:g} s',
                          self.options.log, read_lines(self.options.log)[-8:])
        self._power_off()
        if self.status is None:
            raise self._lost()
        check_warnings(self.options.log, self.what)
        return self.status

    @property
    def what(self):
        """The host and its command, for messages."""
        return f'{self.options.name} ({shlex.join(self.argv)[:60]})'

    def _lost(self):
        """The emulator's log has the registers at each reset."""
        error = from_log(self.options.log, self.what)
        log = Path(self.options.log).with_suffix('.qemu')
        error.lines += [f'emulator: return code {self._process.returncode}',
                        *read_lines(log)[-24:]]
        return error

    def check(self):
        """Raise what wait() would, if the host has ended; else return."""
        if not self.running and self.status is None:
            self._power_off()
            if self.status is None:
                raise self._lost()

    def _power_off(self):
        """Let the emulator flush and end by itself; read to the end."""
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        self.stop()

    def stop(self):
        """End the emulator, however it is."""
        if self._process:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            for thread in self._threads:
                thread.join()
        for end in self.sockets.values():
            end.close()


def interrupt_on_sigterm():
    """Have SIGTERM unwind like Ctrl-C, so that contexts are left."""
    def raise_exit(number, _frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, raise_exit)
