# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
# What the shell scripts share. Source it with $top set to the repository.

die() { echo "${0##*/}: error: $*" >&2; exit 1; }
say() { echo "${0##*/}: $*" >&2; }

# The comment at the top of a script is its help.
usage() { sed -n '/^# SPDX/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

case ${1:-} in -h | --help) usage; exit 0 ;; esac

# The machine's own Python has the modules that QEMU and meson want; one that
# comes first in PATH may not.
PATH=/usr/bin:$PATH
export PATH

cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvm-userfault
# shellcheck disable=SC2034
build=${BUILD:-$top/build}

# Objects do not depend on where the repository is, when they are made, or by
# whom: a second checkout, and a base beside a patched source, hit the cache.
use_ccache() {
	CCACHE_DIR=${CCACHE_DIR:-$cache/ccache}
	CCACHE_BASEDIR=$top
	CCACHE_NOHASHDIR=1
	CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-5G}
	KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC'
	KBUILD_BUILD_USER=kvm-userfault
	KBUILD_BUILD_HOST=localhost
	KBUILD_BUILD_VERSION=1
	# Set, so that the release gets no "+" or commit id.
	LOCALVERSION=
	export CCACHE_DIR CCACHE_BASEDIR CCACHE_NOHASHDIR CCACHE_MAXSIZE
	export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER KBUILD_BUILD_HOST
	export KBUILD_BUILD_VERSION LOCALVERSION
}
