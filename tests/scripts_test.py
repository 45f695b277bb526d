#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""fetch, prepare, refresh and export-series on a toy component."""

import hashlib
import os
import signal
import subprocess
import tarfile
import tempfile
import time
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'
BASE = {'Makefile': 'obj += a.o\n', 'lib/a.c': 'int a(void)\n{\n}\n',
        'lib/b.c': ''.join(f'line {n}\n' for n in range(40))}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Toy(unittest.TestCase):
    """A project with one component, "toy", in a folder of its own."""

    def setUp(self):
        tmp = tempfile.TemporaryDirectory()
        self.addCleanup(tmp.cleanup)
        self.top = Path(tmp.name) / 'project'
        self.dist = Path(tmp.name) / 'dist'
        self.home = self.top / 'toy'
        self.src = self.top / 'build/toy/src'
        self.env = {**os.environ, 'DISTFILES': str(self.dist),
                    'XDG_CACHE_HOME': f'{tmp.name}/cache'}
        for name, text in BASE.items():
            write(Path(tmp.name) / 'toy-1' / name, text)
        self.dist.mkdir()
        self.tar = self.dist / 'toy-1.tar'
        with tarfile.open(self.tar, 'w') as t:
            t.add(Path(tmp.name) / 'toy-1', 'toy-1')
        self.pin(hashlib.sha256(self.tar.read_bytes()).hexdigest())
        write(self.home / 'tree/lib/new.c', 'int new;\n')
        write(self.home / 'patches/series', '')

    def pin(self, digest):
        write(self.home / 'base', 'version 1\npackage toy\nkind binary\n'
              'suite none\npackage-version 1\nunpack tar\n'
              f'file toy-1.tar {digest}\n')

    def script(self, name, *args, good=True):
        done = subprocess.run(
            [SCRIPTS / name, '--top', self.top, *args], env=self.env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False)
        self.assertEqual(done.returncode == 0, good, done.stdout)
        return done.stdout

    def git(self, *args):
        return subprocess.run(['git', '-C', self.src, *args], check=True,
                              text=True, capture_output=True).stdout

    def hook(self, name='lib/a.c', text='int a(void)\n{\n\tnew = 1;\n}\n',
             subject='lib: Hook it'):
        write(self.src / name, text)
        self.git('commit', '-qam', f'{subject}\n\nindex of reasons.')

    def series(self):
        return {p.name: p.read_text()
                for p in sorted((self.home / 'patches').iterdir())}

    def claim(self):
        """Say that the first patch comes with the new file."""
        path = self.home / 'patches/series'
        path.write_text(path.read_text().replace('it.patch',
                                                 'it.patch lib/new.c'))


class Fetch(Toy):
    def test_a_missing_base_is_named_with_the_places(self):
        self.tar.unlink()
        out = self.script('fetch', '--offline', 'toy', good=False)
        for word in ('toy-1.tar', str(self.dist), 'cache', 'DISTFILES'):
            self.assertIn(word, out)

    def test_a_wrong_file_is_refused(self):
        self.tar.write_text('something else')
        out = self.script('fetch', '--offline', 'toy', good=False)
        self.assertIn('not the file wanted', out)

    def test_an_unknown_base(self):
        self.assertIn('no such component',
                      self.script('fetch', 'none', good=False))


class Prepare(Toy):
    def test_an_empty_series(self):
        self.script('prepare', 'toy')
        self.assertTrue((self.src / 'lib/new.c').is_symlink())
        self.assertEqual(self.git('status', '--porcelain'), '')

    def test_links_follow_the_tree(self):
        self.script('prepare', 'toy')
        (self.home / 'tree/lib/new.c').rename(self.home / 'tree/lib/newer.c')
        self.script('prepare', 'toy')
        self.assertFalse((self.src / 'lib/new.c').is_symlink())
        self.assertEqual((self.src / 'lib/newer.c').read_text(), 'int new;\n')

    def test_a_new_file_cannot_hide_one_of_the_base(self):
        write(self.home / 'tree/Makefile', '')
        self.assertIn('new files only',
                      self.script('prepare', 'toy', good=False))

    def test_changed_patches_touch_only_what_differs(self):
        self.script('prepare', 'toy')
        self.hook()
        self.claim_after_refresh()
        old = self.series()
        self.hook('lib/b.c', 'other\n', 'lib: Change another')
        self.script('refresh', 'toy')
        for path in (self.home / 'patches').iterdir():
            path.unlink()
        for name, text in old.items():
            write(self.home / 'patches' / name, text)
        before = (self.src / 'lib/a.c').stat().st_mtime_ns
        self.script('prepare', 'toy')
        self.assertEqual((self.src / 'lib/b.c').read_text(), BASE['lib/b.c'])
        self.assertEqual((self.src / 'lib/a.c').stat().st_mtime_ns, before)

    def claim_after_refresh(self):
        self.script('refresh', 'toy', good=False)
        self.claim()
        self.script('refresh', 'toy')

    def test_work_is_not_thrown_away(self):
        self.script('prepare', 'toy')
        write(self.src / 'lib/a.c', 'mine\n')
        self.script('prepare', 'toy')
        write(self.home / 'patches/series', 'missing.patch\n')
        write(self.home / 'patches/missing.patch', 'From: a <a@b>\nSubject: b\n')
        self.assertIn('uncommitted',
                      self.script('prepare', 'toy', good=False))
        self.git('commit', '-qam', 'lib: Mine')
        self.assertIn('not in', self.script('prepare', 'toy', good=False))
        self.assertEqual((self.src / 'lib/a.c').read_text(), 'mine\n')
        self.script('prepare', '--discard', 'toy')
        self.assertEqual((self.src / 'lib/a.c').read_text(), BASE['lib/a.c'])

    def test_no_fuzz(self):
        self.script('prepare', 'toy')
        self.hook()
        self.script('refresh', 'toy', good=False)
        path = next((self.home / 'patches').glob('*.patch'))
        path.write_text(path.read_text().replace(' int a(void)',
                                                 ' int other(void)'))
        self.assertIn('does not apply',
                      self.script('prepare', 'toy', good=False))
        self.assertIn('new = 1', (self.src / 'lib/a.c').read_text())

    def test_a_users_own_tree_is_copied(self):
        own = self.top.parent / 'own'
        for name, text in BASE.items():
            write(own / name, text + 'own\n')
        write(self.top / 'build/config', f'toy_source={own}\n')
        self.script('prepare', 'toy')
        self.assertEqual((self.src / 'Makefile').read_text(),
                         BASE['Makefile'] + 'own\n')
        self.assertEqual(sorted(p.name for p in own.iterdir()),
                         ['Makefile', 'lib'])

    def test_interrupted_midway(self):
        slow = self.top.parent / 'bin/tar'
        write(slow, '#!/bin/sh\nsleep 5\nexec /bin/tar "$@"\n')
        slow.chmod(0o755)
        env = {**self.env, 'PATH': f'{slow.parent}:{os.environ["PATH"]}'}
        with subprocess.Popen(
                [SCRIPTS / 'prepare', '--top', self.top, 'toy'], env=env,
                stderr=subprocess.PIPE, start_new_session=True,
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.default_int_handler)) as p:
            while not list(self.top.glob('build/toy/new')):
                time.sleep(0.02)
            os.killpg(p.pid, signal.SIGINT)
            self.assertIn(b'interrupted', p.stderr.read())
        self.assertEqual(p.returncode, 130)
        self.assertFalse(self.src.exists())
        self.assertEqual(list(self.top.glob('build/toy/new*')), [])
        self.script('prepare', 'toy')
        self.assertTrue((self.src / 'lib/new.c').exists())


class Series(Toy):
    def setUp(self):
        super().setUp()
        self.script('prepare', 'toy')
        self.hook()

    def test_refresh_is_stable_and_anonymous(self):
        self.script('refresh', 'toy', good=False)
        first = self.series()
        self.git('commit', '-q', '--amend', '--no-edit',
                 '--date=2001-01-01', '--author=Some One <some@one.example>')
        self.script('refresh', 'toy', good=False)
        self.assertEqual(self.series(), first)
        patch = first['0001-lib-Hook-it.patch']
        self.assertIn('\nindex of reasons.', patch)
        for word in ('Date:', 'index 0', 'Some One'):
            self.assertNotIn(word, patch)

    def test_a_new_file_that_no_patch_names_is_told(self):
        out = self.script('refresh', 'toy', good=False)
        self.assertIn('lib/new.c: in tree/, but no patch', out)

    def test_claims_follow_the_subject(self):
        self.script('refresh', 'toy', good=False)
        self.claim()
        self.git('reset', '-q', '--hard', 'base')
        self.hook('Makefile', 'obj += b.o\n', 'Makefile: Come first')
        self.hook()
        self.script('refresh', 'toy')
        self.assertIn('0002-lib-Hook-it.patch lib/new.c\n',
                      self.series()['series'])

    def test_round_trip(self):
        self.script('refresh', 'toy', good=False)
        self.claim()
        self.script('refresh', 'toy')
        out = self.top / 'series'
        self.script('export-series', '--check', 'toy', out)
        text = (out / '0001-lib-Hook-it.patch').read_text()
        self.assertIn('+int new;', text)
        self.assertIn('+\tnew = 1;', text)
        write(self.home / 'tree/lib/more.c', '')
        self.assertIn('lib/more.c', self.script(
            'export-series', 'toy', out, good=False))


if __name__ == '__main__':
    unittest.main()
