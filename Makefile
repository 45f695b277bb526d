# SPDX-License-Identifier: GPL-2.0-or-later
# A front door to ./configure, meson and ninja, which do the work.

# Of "make demo": USERFAULT=auto|on|off, the kind of MEMORY that the guest has (see
# rig/migrate --help), its size and the part of it that is TOUCHED, in MiB.
USERFAULT = auto
MEMORY = memfd
SIZE = 512
TOUCHED = 256
# Of "make demo" and "make bench-kernel": x86 or arm64.
ARCH = x86
# Of "make check-debug", "make check-pages", "make check-sanitizers": all of these, or
# only one, as each takes hours.
DEBUG = kasan kcsan
PAGES = 16k 64k
SANITIZERS = asan tsan
# Of "make soak": how long, and --resume to count on from the last time.
MINUTES = 10
RESUME =

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

#: make demo       migrate a guest that works [MEMORY=guest-memfd] [ARCH=arm64] [USERFAULT=off]
demo: ready
	@ninja -C build demo-parts$(if $(filter arm64,$(ARCH)),-arm64)
	@mkdir -p build/demo
	@rig/migrate --arch $(ARCH) --userfault $(USERFAULT) --memory $(MEMORY) \
		--memory-mib $(SIZE) --touched-mib $(TOUCHED) --logs build/demo \
		--json build/demo/report.json --plot build/demo/report.png

#: make demo-libvirt  virsh migrate --postcopy between two hosts, all its ways
demo-libvirt: ready
	@ninja -C build demo-libvirt-parts
	@tests/libvirt --demo

#: make packages   .deb of the kernel and of QEMU: takes an hour or more [FLAVOUR=full]
packages: ready
	@scripts/deps packages
	@scripts/build-packages qemu build/packages
	@scripts/build-packages kernel build/packages

#: make check-packages  install them in virtual hosts, and migrate
check-packages: ready
	@scripts/deps packages
	@ninja -C build demo-parts
	@tests/packages

#: make check      what CI runs, and a summary [SUITE="style series ..."]
check: ready
	@ninja -C build
	@scripts/run-tests $(SUITE)

#: make check-debug  selftests and migrations on KASAN and KCSAN kernels [DEBUG=kcsan]
check-debug: ready
	@ninja -C build $(addsuffix -parts,$(DEBUG))
	@scripts/run-tests $(DEBUG)

#: make check-all    all migrations, QEMU's complete migration-test: 40 minutes or more
check-all: ready
	@ninja -C build
	@scripts/run-tests all

#: make check-sanitizers  QEMU's qtests with ASan and UBSan, and with TSan [SANITIZERS=asan]
check-sanitizers: ready
	@ninja -C build $(addsuffix -parts,$(SANITIZERS))
	@scripts/run-tests $(SANITIZERS)

#: make check-kvm    all KVM selftests of the base, on its kernel and on ours
check-kvm: ready
	@ninja -C build base-parts
	@tests/check-kvm --arch x86
	@tests/check-kvm --arch arm64

#: make check-qemu   QEMU's own tests, base against series; migrations between both
check-qemu: ready
	@ninja -C build check-qemu-parts
	@tests/check-qemu
	@tests/migrate --base-qemu

#: make check-pages  arm64 selftests on kernels with pages of 16 and 64 KiB [PAGES=64k]
check-pages: ready
	@ninja -C build $(addsuffix -parts,$(PAGES))
	@scripts/run-tests $(PAGES)

#: make bench-kernel  demand paging, userfaultfd against KVM Userfault [ARCH=arm64]
bench-kernel: ready
	@ninja -C build
	@ninja -C build base-parts
	@tests/bench-kernel --arch $(ARCH)

#: make bench-migrate  userfaultfd against KVM Userfault, a guest at work
bench-migrate: ready
	@ninja -C build demo-parts
	@tests/bench-migrate

#: make bench-syscalls  what a destination asks of its kernel for each page
bench-syscalls: ready
	@ninja -C build demo-parts
	@tests/bench-syscalls

#: make soak       migrate back and forth and disturb it [MINUTES=10] [RESUME=--resume]
soak: ready
	@ninja -C build demo-parts
	@tests/soak --minutes $(MINUTES) $(RESUME)

#: make clean      remove what was built, keep the prepared sources
clean:
	rm -rf build/*/obj* build/linux/headers* build/selftests* build/guest* build/libvirt* \
		build/userland-arm64 build/firmware build/packages build/demo*

#: make distclean  remove build/; the cache folder stays
distclean:
	scripts/distclean

.PHONY: help deps configure ready all demo demo-libvirt packages check check-all \
	check-debug check-kvm check-qemu check-packages check-pages check-sanitizers \
	bench-kernel bench-migrate bench-syscalls soak clean distclean
