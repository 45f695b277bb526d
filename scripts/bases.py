# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding, checking and downloading the files of a base."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import carry
from carry import CarryError, say

KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'


def base_of(top, name):
    home = Path(top) / name / 'base'
    return carry.Base(home if home.exists()
                      else Path(top) / 'scripts' / f'{name}.base')


def distfiles():
    words = os.environ.get('DISTFILES', '').split(':')
    return [Path(w) for w in words if w]


def good(path, want):
    """True if path is there and is the file we want; wrong ones are told."""
    if not path.is_file():
        return False
    have = carry.sha256(path)
    if have != want:
        say(f'{path} is not the file wanted: its SHA-256 is\n'
            f'  {have}, and not\n  {want}')
    return have == want


def find(base, cache):
    """Where each file of a base is, and which are missing."""
    found, missing = {}, []
    for name, want in base.files.items():
        places = [d / name for d in [*distfiles(), cache]]
        hits = [p for p in places if good(p, want)]
        if hits:
            found[name] = hits[0]
        else:
            missing.append(name)
    return found, missing


def mirror():
    """The address of the Debian archive that this machine is set up for."""
    out = subprocess.run(
        ['apt-get', 'indextargets', '--format', '$(SITE)', 'Origin: Debian',
         'Label: Debian'], capture_output=True, text=True, check=False).stdout
    if out.split():
        return out.split()[0]
    sources = [Path('/etc/apt/sources.list'),
               *Path('/etc/apt/sources.list.d').glob('*.sources'),
               *Path('/etc/apt/sources.list.d').glob('*.list')]
    text = '\n'.join(p.read_text() for p in sources if p.exists())
    uris = re.findall(r'^(?:deb\s(?:.*?\s)??|URIs:\s*)(\w[\w+]*:/\S+?/debian)'
                      r'/?(?:\s|$)', text, flags=re.M)
    if not uris:
        raise CarryError('no Debian archive among the machine\'s apt sources')
    return uris[0]


class Apt:
    """apt with its own sources, lists and cache, in the cache folder."""

    def __init__(self, base):
        self.base = base
        self.home = carry.cache_dir('apt', '-'.join(
            [base.suite, *filter(None, [base.keys.get('architecture')])]))
        for sub in ('lists/partial', 'cache/archives/partial'):
            (self.home / sub).mkdir(parents=True, exist_ok=True)
        kind = 'deb-src' if base.kind == 'source' else 'deb'
        self.arch = base.keys.get('architecture')
        # A binary base may be several packages, of one version.
        self.packages = [':'.join(filter(None, [package, self.arch]))
                         for package in base.package.split()]
        self.package = self.packages[0]
        self.sources = self.home / 'sources.list'
        limit = f'arch={self.arch} ' if self.arch else ''
        self.sources.write_text(f'{kind} [{limit}signed-by={KEYRING}] '
                                f'{mirror()} {base.suite} main\n')

    def options(self):
        return ['-o', f'Dir::Etc::sourcelist={self.sources}',
                '-o', 'Dir::Etc::sourceparts=/dev/null',
                '-o', f'Dir::State::lists={self.home}/lists',
                '-o', f'Dir::Cache={self.home}/cache',
                '-o', 'APT::Sandbox::User=root',
                '-o', 'Acquire::Languages=none', '-qq',
                *(['-o', f'APT::Architectures::={self.arch}']
                  if self.arch else [])]

    def get(self, *args, **kwargs):
        return carry.run('apt-get', *self.options(), *args, **kwargs)

    def cache(self, *args):
        return carry.run('apt-cache', *self.options(), *args)

    def download(self, folder):
        base = self.base
        wanted = [f'{package}={base.package_version}'
                  for package in self.packages]
        what = ' '.join(wanted)
        try:
            self.get('update')
            if base.kind == 'source':
                self.get('source', '--download-only', '--only-source', *wanted,
                         cwd=folder)
            else:
                self.get('download', *wanted, cwd=folder)
        except CarryError as err:
            raise CarryError(f'apt has no {what} in {base.suite}\n{err}\n'
                             f'{self.newest()}') from err

    def newest(self):
        """What the archive has instead, in the form of a base file."""
        base = self.base
        try:
            verb = 'showsrc' if base.kind == 'source' else 'show'
            text = self.cache(verb, self.package)
        except CarryError:
            return f'The archive has no {base.package} in {base.suite} now.'
        # What is only installed here, and not in the archive, has no file.
        lines = max((pin_lines(p) for p in text.strip().split('\n\n')
                     if re.search('^(Filename|Files):', p, flags=re.M)),
                    key=lambda ls: version_key(ls[0].split()[1]))
        return (f'Newest of {base.package} in {base.suite}; to pin it, put '
                f'these lines in place of the old ones in {base.path}:\n  '
                + '\n  '.join(lines))


def pin_lines(paragraph):
    """A paragraph of Packages or Sources as the lines of a base file."""
    version = re.search(r'^Version: (.*)', paragraph, flags=re.M)[1]
    sums = re.search(r'^Checksums-Sha256:\n((?: .*\n?)+)', paragraph,
                     flags=re.M)
    if sums:
        rows = [row.split() for row in sums[1].strip().splitlines()]
        files = [(row[2], row[0]) for row in rows]
    else:
        name = re.search(r'^Filename: .*/(.*)', paragraph, flags=re.M)[1]
        files = [(name, re.search(r'^SHA256: (.*)', paragraph,
                                  flags=re.M)[1])]
    upstream = re.sub(r'^\d+:|-[^-]*$', '', version).split('+')[0]
    return ([f'version {upstream}', f'package-version {version}']
            + [f'file {name} {digest}' for name, digest in files])


def version_key(version):
    return [int(n) for n in re.findall(r'\d+', version)]


def download(base, missing, cache):
    """Fetch through apt; a file gets its final name once it is checked."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix='.partial-') as tmp:
        say(f'{base.package} {base.package_version}: asking apt')
        Apt(base).download(tmp)
        # apt puts an epoch into a name that the archive's file has not.
        got = {carry.sha256(p): p for p in Path(tmp).iterdir()}
        for name in missing:
            if base.files[name] not in got:
                raise CarryError(f'apt did not give the {name} of '
                                 f'{base.path}')
            got[base.files[name]].rename(cache / name)


def fetch(top, name, offline=False):
    """All files of a base, in the order of the base file."""
    base, cache = base_of(top, name), carry.cache_dir('bases')
    found, missing = find(base, cache)
    if missing:
        try:
            if offline:
                raise CarryError('not asked: offline')
            if not shutil.which('apt-get'):
                raise CarryError('this machine has no apt-get')
            download(base, missing, cache)
        except CarryError as err:
            places = [*distfiles(), cache]
            raise CarryError(
                f'{name} {base.version}: {", ".join(missing)} cannot be had.\n'
                f'looked in: {", ".join(str(p) for p in places)} '
                f'(DISTFILES adds folders), then apt:\n{err}') from err
        found, _ = find(base, cache)
    return [found[n] for n in base.files]
