# SPDX-License-Identifier: GPL-2.0-or-later
"""How a change to an upstream source is carried.

A component (linux, qemu) is a base, whole new files in tree/, and a series
of hooks in patches/. The prepared source, build/NAME/src, is a git work tree
with the pristine base as the tag "base", one commit for each hook on top of
it, and a link for each new file.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from email import header, message_from_string
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
# Kernel architecture: its object folder beside src, and what the names of its
# compiler and its like begin with.
ARCHITECTURES = {'x86': ('obj', ''),
                 'arm64': ('obj-arm64', 'aarch64-linux-gnu-')}
IDENTITY = ('KVM Userfault post-copy', 'kvm-userfault@example.invalid')


class CarryError(Exception):
    """Something that the person who called can understand and mend."""


def run(*args, **kwargs):
    """Run a command; a failure becomes a CarryError that shows its output."""
    args = [str(a) for a in args]
    done = subprocess.run(args, check=False, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **kwargs)
    if done.returncode:
        raise CarryError(f'{" ".join(args)}: exit status {done.returncode}\n'
                         f'{done.stdout.strip()}')
    return done.stdout


def git(cwd, *args, **kwargs):
    """Run git free of the user's own configuration: same bytes anywhere."""
    name, mail = IDENTITY
    env = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
    env.update(GIT_CONFIG_GLOBAL='/dev/null', GIT_CONFIG_NOSYSTEM='1',
               GIT_AUTHOR_NAME=name, GIT_AUTHOR_EMAIL=mail, LC_ALL='C',
               GIT_COMMITTER_NAME=name, GIT_COMMITTER_EMAIL=mail)
    return run('git', '-C', cwd, *args, env=env, **kwargs)


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def kernel_make(src, obj, arch):
    """The command line of a kernel's make, to which targets are added."""
    cross = ARCHITECTURES[arch][1]
    return ['make', '-s', f'-j{os.cpu_count()}', '-C', src, f'O={obj}',
            f'ARCH={arch}', f'CROSS_COMPILE={cross}', f'CC=ccache {cross}gcc']


def compile_only_config(comp, src, obj, arch, env):
    """The rig's .config plus what our patches touch and no rig runs.

    Without it, files of ours would be built for nothing, or not at all.
    """
    rig = comp.build / ARCHITECTURES[arch][0] / '.config'
    more = comp.top / f'linux/config/check/{arch}.config'
    config = Path(obj) / '.config'
    wanted = more.read_text() if more.exists() else ''
    config.write_text(rig.read_text() + wanted)
    run(*kernel_make(src, obj, arch), 'olddefconfig', env=env)
    lines = config.read_text().splitlines()
    for line in wanted.splitlines():
        if line.startswith('CONFIG_') and line not in lines:
            raise CarryError(f'not in {config}: {line}, which {more} wants')


class Base:
    """A base file: "KEY VALUE" lines, and one "file NAME SHA256" per file."""

    def __init__(self, path):
        self.path, self.keys, self.files = Path(path), {}, {}
        try:
            lines = self.path.read_text().splitlines()
        except OSError as err:
            raise CarryError(f'{err}: no such component?') from err
        for line in lines:
            key, _, value = line.partition(' ')
            if key == 'file':
                name, self.files[name] = value.split()
            elif key and not key.startswith('#'):
                self.keys[key] = value

    def __getattr__(self, name):
        try:
            return self.keys[name.replace('_', '-')]
        except KeyError:
            raise CarryError(f'{self.path}: no "{name}" line') from None


class Component:
    """Where the parts of a component are; "linux-base" is a bare base."""

    def __init__(self, name, top=TOP):
        self.name, self.top = name, Path(top).resolve()
        self.origin = name.removesuffix('-base')
        self.pristine = self.origin != name
        self.home = self.top / self.origin
        self.tree = self.home / 'tree'
        self.patches = self.home / 'patches'
        self.build = self.top / 'build' / name
        self.src = self.build / 'src'
        self.base = Base(self.home / 'base')

    def tree_files(self):
        """Relative paths of the new files, sorted."""
        return sorted(str(p.relative_to(self.tree))
                      for p in self.tree.rglob('*')
                      if p.is_file() and p.name != '.gitkeep')

    def series(self):
        return read_series(self.patches)

    def user_source(self):
        """The source tree that configure was given, or None."""
        return config(self.top).get(f'{self.origin}_source')

    def git(self, *args, **kwargs):
        return git(self.src, *args, **kwargs)

    def head(self, rev='HEAD'):
        return self.git('rev-parse', '--verify', f'{rev}^{{commit}}').strip()

    def uncommitted(self):
        return self.git('status', '--porcelain').rstrip()


def config(top=TOP):
    """What configure wrote: "key=value" lines."""
    path = Path(top) / 'build' / 'config'
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split('=', 1) for line in lines if '=' in line)


def cache_dir(*parts):
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache, 'kvm-userfault', *parts)


def read_series(folder):
    """The series of a folder: a list of (patch name, its new files)."""
    path = Path(folder) / 'series'
    lines = path.read_text().splitlines() if path.exists() else []
    words = [line.split() for line in lines if not line.startswith('#')]
    return [(w[0], w[1:]) for w in words if w]


def write_series(folder, entries):
    lines = ['# NAME.patch [new files of tree/ that come with it...]']
    lines += [' '.join([name, *files]) for name, files in entries]
    write_if_changed(Path(folder) / 'series', '\n'.join(lines) + '\n')


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def subject(patch):
    """The subject of a patch in mail form, as git log would show it."""
    raw = message_from_string(Path(patch).read_text())['Subject'] or ''
    text = str(header.make_header(header.decode_header(raw)))
    return re.sub(r'^\[PATCH[^]]*\]\s*', '', ' '.join(text.split()))


def normalise(text):
    """Strip what differs between two people who make the same patch.

    Authors and dates are those of this repository's own history.
    """
    head, sep, diff = text.partition('\ndiff --git ')
    head = re.sub(r'^From: .*(\n[ \t].*)*', 'From: %s <%s>' % IDENTITY,
                  head, count=1, flags=re.M)
    head = re.sub(r'^Date: .*\n', '', head, count=1, flags=re.M)
    diff = re.sub(r'^index [0-9a-f]+\.\.[0-9a-f]+.*\n', '', diff, flags=re.M)
    return head + sep + diff


def format_series(repo, revs, outdir):
    """Write revs as normalised patches; return [(name, subject), ...]."""
    outdir = Path(outdir)
    names = git(repo, 'format-patch', '--quiet', '--zero-commit', '-N',
                '--no-signature', '--no-stat', '--always', '--no-renames',
                '--diff-algorithm=myers', '-o', outdir, revs)
    names = sorted(p.name for p in outdir.glob('*.patch')) or names.split()
    for name in names:
        path = outdir / name
        path.write_text(normalise(path.read_text()))
    return [(name, subject(outdir / name)) for name in names]


def am(repo, patch):
    """Apply one patch: no fuzz, no three-way merge; an empty one counts."""
    try:
        git(repo, 'am', '--quiet', '--no-3way', '--keep-non-patch',
            '--empty=keep', '--whitespace=nowarn', Path(patch).resolve())
    except CarryError as err:
        raise CarryError(f'{patch} does not apply\n{err}') from err


def add_blobs(comp, repo, files):
    """Put new files of tree/ into the index of repo, without a checkout."""
    for name in files:
        path = comp.tree / name
        if not path.is_file():
            raise CarryError(f'{comp.patches}/series names {name}, '
                             f'which is not in {comp.tree}')
        mode = '100755' if os.access(path, os.X_OK) else '100644'
        blob = git(repo, 'hash-object', '-w', path).strip()
        git(repo, 'update-index', '--add', '--cacheinfo',
            f'{mode},{blob},{name}')


@contextlib.contextmanager
def scratch(comp, name):
    """A second work tree at the base, gone afterwards.

    It has only an index: git apply takes the few files that it changes from
    there, so that a series is applied within a second.
    """
    path = comp.build / name
    drop_scratch(comp, path)
    try:
        git(comp.src, 'worktree', 'add', '--detach', '--no-checkout',
            path, 'base')
        git(path, 'read-tree', 'HEAD')
        yield path
    finally:
        drop_scratch(comp, path)


def drop_scratch(comp, path):
    shutil.rmtree(path, ignore_errors=True)
    git(comp.src, 'worktree', 'prune')


@contextlib.contextmanager
def locked(comp):
    """One at a time works on a prepared source."""
    comp.build.mkdir(parents=True, exist_ok=True)
    with open(comp.build / '.lock', 'w') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'waiting for another script that works on {comp.build}')
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def build_env(top):
    """The environment of a build, as scripts/lib.sh sets it up."""
    text = run('sh', '-c', 'top=$1; . "$1/scripts/lib.sh"; use_ccache; env -0',
               'build', top)
    return dict(line.split('=', 1) for line in text.split('\0') if line)


def say(text):
    print(f'{Path(sys.argv[0]).name}: {text}', file=sys.stderr, flush=True)


def parser(doc):
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--top', default=TOP, type=Path, metavar='DIR',
                   help='the project to work on (default: this one)')
    return p


def main(body):
    """Run body; a CarryError is a message, Ctrl-C unwinds and says so."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        sys.exit(body())
    except CarryError as err:
        say(f'error: {err}')
        sys.exit(1)
    except KeyboardInterrupt:
        say('interrupted; nothing half-done is left, run it again')
        sys.exit(130)
