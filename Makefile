# SPDX-License-Identifier: GPL-2.0-or-later
# A front door to ./configure, meson and ninja, which do the work.

# Of "make demo": USERFAULT=auto|on|off, MEMORY of the guest and the part of it
# that is TOUCHED, in MiB.
USERFAULT = auto
MEMORY = 512
TOUCHED = 256

help:
	@sed -n 's/^#: //p' Makefile

#: make deps       install what the project needs (apt, as root)
deps:
	@scripts/deps

#: make configure  check for that, and set up build/
configure:
	@./configure

build/build.ninja: | deps
	@./configure

ready: build/build.ninja
	@:

#: make all        fetch, patch and build everything
all: ready
	@ninja -C build

#: make demo       migrate a guest that works [USERFAULT=off] [MEMORY=MiB]
demo: ready
	@ninja -C build demo-parts
	@mkdir -p build/demo
	@rig/migrate --userfault $(USERFAULT) --memory-mib $(MEMORY) \
		--touched-mib $(TOUCHED) --logs build/demo \
		--json build/demo/report.json --plot build/demo/report.png

#: make check      every test, and a summary [SUITE="style series ..."]
check: ready
	@ninja -C build
	@scripts/run-tests $(SUITE)

#: make clean      remove what was built, keep the prepared sources
clean:
	rm -rf build/*/obj build/linux/headers build/selftests build/guest \
		build/firmware build/demo

#: make distclean  remove build/; the cache folder stays
distclean:
	scripts/distclean

.PHONY: help deps configure ready all demo check clean distclean
