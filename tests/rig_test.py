#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The rig's own tests: each way a virtual host can end is told apart.

  tests/rig_test.py [TEST...]

Uses the emulator and the kernel that rig/vhost uses (RIG_QEMU, RIG_KERNEL).
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

RIG = Path(__file__).resolve().parent.parent / 'rig'
sys.path.insert(0, str(RIG))

from plot import rates                                      # noqa: E402
from report import percentile                               # noqa: E402


class HostCase(unittest.TestCase):
    """Runs rig/vhost with its logs in a folder that goes away."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix='rig-test-')
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / 'host.serial.log'

    def command(self, form, *arguments):
        return [RIG / 'vhost', form, '--log', self.log, '--timeout', '120',
                *map(str, arguments)]

    def vhost(self, *arguments, form='run'):
        return subprocess.run(self.command(form, *arguments), text=True,
                              capture_output=True, timeout=300)

    def shell(self, script, *options):
        return self.vhost(*options, '--', '/bin/sh', '-c', script)

    def assert_error(self, done, code, *words):
        """Exit code, and words that the message must have."""
        self.assertEqual(done.returncode, code, done.stderr)
        for word in (*words, str(self.log)):
            self.assertIn(word, done.stderr)


class CommandTest(HostCase):

    def test_output_and_status(self):
        done = self.shell('echo to stdout; echo to stderr >&2; exit 7')
        self.assertEqual(done.returncode, 7, done.stderr)
        self.assertEqual(done.stdout, 'to stdout\nto stderr\n')

    def test_much_output_is_whole(self):
        done = self.shell('seq 1 50000')
        self.assertEqual(done.stdout.split(), [str(n) for n in range(1, 50001)])

    def test_environment_folder_and_share(self):
        done = self.shell('echo "$A" >/run/results/file; pwd', '--cwd', '/usr',
                          '--env', 'A=a  b', '--share', self.folder)
        self.assertEqual(done.stdout, '/usr\n')
        self.assertEqual((self.folder / 'file').read_text(), 'a  b\n')

    def test_root_is_writable_but_not_the_machine(self):
        done = self.shell(f'echo x >{self.folder}/new && cat {self.folder}/new')
        self.assertEqual(done.stdout, 'x\n', done.stderr)
        self.assertFalse((self.folder / 'new').exists())

    def test_kvm_is_there(self):
        done = self.shell('test -c /dev/kvm && test -d /sys/kernel/tracing/events/kvm')
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_pair_has_a_network(self):
        done = self.vhost('--a', 'python3 -m http.server -b 10.77.0.1 8000 '
                          '>/dev/null 2>&1 & sleep 12',
                          '--b', 'sleep 4; ping -c 1 10.77.0.1 >/dev/null; '
                          'python3 -c "import urllib.request as u; print('
                          "u.urlopen('http://10.77.0.1:8000').status)\"",
                          form='pair')
        self.assertIn('b| 200\n', done.stdout, done.stderr)


class ErrorTest(HostCase):

    def test_panic(self):
        self.assert_error(self.shell('echo c >/proc/sysrq-trigger; sleep 60'),
                          121, 'Panic', 'Kernel panic - not syncing')

    def test_lost(self):
        self.assert_error(self.shell('echo b >/proc/sysrq-trigger; sleep 60'),
                          120, 'LostVM')

    def test_warning(self):
        for line in ('WARNING: test', 'BUG: test', 'INFO: task test:1 blocked '
                     'for more than 240 seconds', 'rcu: INFO: rcu_sched '
                     'detected stalls on CPUs/tasks'):
            with self.subTest(line):
                self.assert_error(self.shell(f'echo "{line}" >/dev/kmsg'),
                                  122, 'KernelWarning', line)

    def test_timeout(self):
        started = time.monotonic()
        done = self.shell('sleep 1000', '--timeout', '8')
        self.assert_error(done, 123, 'Timeout')
        self.assertLess(time.monotonic() - started, 60)

    def test_missing_kernel(self):
        done = self.vhost('--kernel', '/nonexistent', '--', 'true')
        self.assertEqual(done.returncode, 119)
        self.assertIn('/nonexistent is missing', done.stderr)

    def test_signals_leave_no_process(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with self.subTest(number):
                self.interrupt(number)

    def interrupt(self, number):
        process = subprocess.Popen(
            self.command('run', '--', 'sleep', '1000'),
            stderr=subprocess.DEVNULL)
        while not self.emulators():
            time.sleep(0.1)
        process.send_signal(number)
        process.wait(20)
        time.sleep(0.5)
        self.assertEqual(self.emulators(), [])

    def emulators(self):
        """Processes that have our log's name in their arguments."""
        found = []
        for entry in Path('/proc').glob('[0-9]*/cmdline'):
            try:
                arguments = entry.read_bytes()
            except OSError:
                continue        # has ended
            if os.fsencode(f'id=serial,path={self.log}') in arguments:
                found.append(entry)
        return found


class ArithmeticTest(unittest.TestCase):

    def test_percentile(self):
        self.assertEqual(percentile([0, 0, 0, 100], 50), 12)
        self.assertEqual(percentile([50, 50], 99), 4)
        self.assertIsNone(percentile([], 50))

    def test_rates(self):
        points = [[n / 10, n] for n in range(50)]
        self.assertEqual([round(value) for value in rates(points)[1]], [10] * 50)


if __name__ == '__main__':
    unittest.main()
