# SPDX-License-Identifier: GPL-2.0-or-later
"""Two virtual hosts with libvirt, and an operator who types commands.

The hosts run libvirt's own daemons, unmodified, with the project's QEMU as
<emulator> and its kernel. Operator types commands in them by way of rig/agent.py and
prints each before what it says. Nothing of it goes through the hosts' network but
what libvirt and QEMU send.
"""

import json
import shlex
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from agent import Agent
from client import Client, guest_ip_parameter
from errors import RigError
from guest import kernel_line
from vhost import TOP, Options, VirtualHost, trio_options

GUEST_PORT = '/run/guest.sock'
LOG_TIME = 30
IMAGE = '/var/lib/libvirt/images/{}.qcow2'
IMAGE_SIZE = '8M'
# A monitor beside libvirt's, see scripts/postcopy-recover
RECOVER_SOCKET = '/var/lib/libvirt/qemu/{}-recover.sock'
QEMU_IMG = TOP / 'build/qemu/obj/qemu-img'

# Talk to pagecheck through the channel's socket: send a word, wait for an event.
TALK = '''
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(float(sys.argv[4]))
s.connect(sys.argv[1])
s.sendall((sys.argv[2] + '\\n').encode() if sys.argv[2] else b'')
if not sys.argv[3]:
    sys.exit()
for line in s.makefile():
    try:
        event = json.loads(line)
    except ValueError:
        continue        # begun before somebody listened
    if event.get('event') == sys.argv[3]:
        print(line, end='')
        break
'''


class CommandFailed(RigError):
    """A command did not end as it had to."""


def domain_xml(name, memory='memfd', memory_mib=384, touched_mib=128, vcpus=2,
               userfault=None):
    """A domain whose guest is pagecheck, with a disk and a NIC."""
    backing = {
        'memfd': "<memoryBacking><source type='memfd'/><access mode='shared'/>"
                 '</memoryBacking>',
        'anonymous': '',
    }[memory]
    recover = RECOVER_SOCKET.format(name)
    # libvirt writes -accel itself, and the first one counts.
    override = ("<qemu:arg value='-machine'/>"
                f"<qemu:arg value='kvm-userfault={userfault}'/>"
                if userfault else '')
    return f'''
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  {backing}
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{TOP}/build/linux/obj/arch/x86/boot/bzImage</kernel>
    <initrd>{TOP}/build/guest/initramfs.cpio</initrd>
    <cmdline>{kernel_line('x86', touched_mib)} {guest_ip_parameter()}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough' migratable='off'/>
  <devices>
    <emulator>{TOP}/build/qemu/obj/qemu-system-x86_64</emulator>
    <serial type='file'><source path='/var/log/libvirt/{name}-console.log'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{GUEST_PORT}'/>
      <target type='virtio' name='guest'/>
    </channel>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='{IMAGE.format(name)}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <source bridge='br0'/>
      <model type='virtio'/>
      <driver name='vhost'/>
      <rom enabled='no'/>
    </interface>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-L'/><qemu:arg value='{TOP}/build/firmware'/>
    <qemu:arg value='-chardev'/>
    <qemu:arg value='socket,id=recover,server=on,wait=off,path={recover}'/>
    <qemu:arg value='-mon'/><qemu:arg value='chardev=recover,mode=control'/>
    {override}
  </qemu:commandline>
</domain>
'''


def make_pki(folder):
    """Certificates for hosts a and b, and their authority, made on the spot."""
    folder.mkdir(parents=True, exist_ok=True)

    def openssl(*words, text=None):
        subprocess.run(['openssl', *words], cwd=folder, check=True, input=text,
                       text=True, capture_output=True)

    openssl('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj',
            '/CN=rig', '-keyout', 'ca-key.pem', '-out', 'ca.pem')
    openssl('req', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=hosts',
            '-keyout', 'key.pem', '-out', 'request.pem')
    (folder / 'extensions').write_text(
        'subjectAltName=DNS:a,DNS:b,IP:10.77.0.1,IP:10.77.0.2\n'
        'extendedKeyUsage=serverAuth,clientAuth\n')
    openssl('x509', '-req', '-in', 'request.pem', '-CA', 'ca.pem', '-CAkey',
            'ca-key.pem', '-CAcreateserial', '-days', '2', '-extfile',
            'extensions', '-out', 'cert.pem')
    return folder


class Operator:
    """Two hosts, and somebody who types commands in them; a context manager.

    The client on the third host, c, is there for whoever wants a session.
    """

    def __init__(self, logs, show, timeout=300, layer=TOP / 'build/libvirt'):
        """show is called with each line that a person would see.

        layer is what scripts/build-libvirt has made.
        """
        self.logs = Path(logs)
        self.layer = layer
        self.show = show
        self.timeout = timeout
        self.hosts = {}
        self.agents = {}
        self.client = None
        self._stack = ExitStack()

    def __enter__(self):
        common = Options(memory=1800, layer=self.layer,
                         timeout=self.timeout, pipes=('agent',), bridge=True,
                         log=self.logs / 'x.serial.log')
        client = Options(cpus=1, memory=512, timeout=self.timeout,
                         pipes=('agent',), log=common.log)
        with ExitStack() as stack:
            *pair, third = trio_options(common, client)
            self.client = stack.enter_context(Client(third))
            for options in pair:
                host = stack.enter_context(
                    VirtualHost(options, [TOP / 'rig/agent.py']))
                self.hosts[options.name] = host
                self.agents[options.name] = Agent(options.name,
                                                  host.sockets['agent'])
            pki = make_pki(self.logs / 'pki')
            for name in self.hosts:
                self.quietly(name, [TOP / 'rig/libvirt-setup', pki])
            self._stack = stack.pop_all()
        return self

    def _save_logs(self):
        """What QEMU said, and libvirt of it, beside the other logs."""
        for name, agent in self.agents.items():
            _, text = agent.wait(agent.start(
                ['sh', '-c', 'tail -n +1 /var/log/libvirt/qemu/*.log'],
                timeout=LOG_TIME), self.check)
            (self.logs / f'{name}.qemu.log').write_text(text)

    def __exit__(self, *exc):
        try:
            self._save_logs()
            if exc[0] is None:
                for agent in self.agents.values():
                    agent.quit()
                for host in self.hosts.values():
                    host.wait()     # complains if the kernel did
                self.client.power_off()
        finally:
            self._stack.close()

    def check(self):
        """Raise if a host is gone."""
        for host in self.hosts.values():
            host.check()

    def start(self, host, words, text=''):
        """Start a command; finish() has what it returns."""
        self.show(f'{host}$ {shlex.join(map(str, words))}')
        return host, words, self.agents[host].start(words, text, self.timeout)

    def finish(self, started, status=0):
        """The output of a command, which has to end with that status.

        None: any but 0.
        """
        host, words, number = started
        got, output = self.agents[host].wait(number, self.check)
        # virsh draws its progress over itself: the last state will do.
        for line in output.replace('\r', '\n').splitlines():
            if line.strip() and not line.startswith('Migration: ['):
                self.show(line)
        if got != status if status is not None else got == 0:
            raise CommandFailed(f'on {host}: {shlex.join(map(str, words))}: exit '
                                f'status {got}\n{output[-2000:]}')
        return output

    def type(self, host, line, status=0):
        """A command as a person types it. Returns its output."""
        return self.finish(self.start(host, shlex.split(line)), status)

    def quietly(self, host, words, text=''):
        """A command that a person would not type. Returns its output."""
        status, output = self.agents[host].wait(
            self.agents[host].start(words, text, self.timeout), self.check)
        if status:
            raise CommandFailed(f'on {host}: {shlex.join(map(str, words))}: exit '
                                f'status {status}\n{output[-2000:]}')
        return output

    # The guest

    def talk(self, host, word, event):
        """Send the guest a word, if any, and return the report of an event, if any."""
        text = self.quietly(host, ['python3', '-c', TALK, GUEST_PORT, word,
                                   event, self.timeout])
        return json.loads(text) if text else None

    def verify(self, host):
        """Have the guest verify its memory and its disk: what pagecheck reports."""
        report = self.talk(host, 'verify', 'verified')
        self.talk(host, 'run', '')
        return report

    def query_migrate(self, host, name):
        """What QEMU says, by way of libvirt."""
        text = self.quietly(host, ['virsh', 'qemu-monitor-command', name,
                                   '{"execute":"query-migrate"}'])
        return json.loads(text)['return']

    def state(self, host, name):
        """libvirt's word for the domain's state, and the reason."""
        return self.type(host, f'virsh domstate --reason {name}').strip()

    def wait_for_state(self, host, name, wanted, limit=120):
        """Wait until the domain's state and reason have that in them."""
        end = time.monotonic() + limit
        while wanted not in (state := self.quietly(
                host, ['virsh', 'domstate', '--reason', name]).strip()):
            if time.monotonic() > end:
                raise CommandFailed(f'{name} on {host} is {state}, not {wanted}')
            time.sleep(0.3)
        return state

    def wait_for_end(self, host, name, limit=120):
        """Wait until the domain does not run on a host any more."""
        end = time.monotonic() + limit
        while name in self.quietly(host, ['virsh', 'list', '--name']).split():
            if time.monotonic() > end:
                raise CommandFailed(f'{name} is on {host} still: '
                                    + self.state(host, name))
            time.sleep(0.3)

    def monitor_command(self, host, name, command, **arguments):
        """A QMP command, typed by way of libvirt."""
        text = json.dumps({'execute': command, 'arguments': arguments})
        self.finish(self.start(host, ['virsh', 'qemu-monitor-command', name, text]))

    def make_image(self, host, name):
        """An empty disk for the guest."""
        self.type(host, f'{QEMU_IMG} create -q -f qcow2 {IMAGE.format(name)} '
                  f'{IMAGE_SIZE}')

    def cut(self, name):
        """Take a host's network away, or give it back with join()."""
        self.type(name, 'ip link set eth0 down')

    def join(self, name):
        """Give a host's network back."""
        self.type(name, 'ip link set eth0 up')
