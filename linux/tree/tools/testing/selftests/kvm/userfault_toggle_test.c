// SPDX-License-Identifier: GPL-2.0
/*
 * Test that KVM Userfault can be turned on and off under a slot that is in use:
 * by running vCPUs, and by a guest_memfd, whose binding has to follow the slot.
 */
#include <fcntl.h>
#include <pthread.h>

#include <linux/falloc.h>

#include "kvm_userfault_util.h"
#include "processor.h"

#include "kvm_test_harness.h"

#define NR_VCPUS	16
#define NR_TOGGLES	40
#define TEST_NPAGES	67

/* Two slots share a guest_memfd, the first of them does not begin at its start. */
#define GMEM_FIRST_PAGE	3
#define GMEM_NPAGES	(GMEM_FIRST_PAGE + 2 * TEST_NPAGES)
#define GMEM_FLAGS	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

static u64 gmem_offset(struct userfault_slot *slot)
{
	u64 page = GMEM_FIRST_PAGE + (slot->id - USERFAULT_SLOT) * TEST_NPAGES;

	return page * slot->page_size;
}

/* A slot backed by nothing but @fd, which userspace fills through a mapping. */
static void gmem_slot_add(struct userfault_slot *slot, struct kvm_vm *vm, int fd,
			  int index)
{
	size_t size = TEST_NPAGES * getpagesize();

	userfault_slot_init(slot, vm, USERFAULT_GPA + index * SZ_1G, TEST_NPAGES);
	slot->id += index;
	slot->base_flags = KVM_MEM_GUEST_MEMFD;
	vm_mem_add(vm, VM_MEM_SRC_ANONYMOUS, slot->gpa, slot->id,
		   vm_calc_num_guest_pages(vm->mode, size), slot->base_flags,
		   fd, gmem_offset(slot));
	userfault_slot_map(slot);
	slot->mem = __kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			       gmem_offset(slot));
}

static int gmem_create(struct kvm_vm *vm)
{
	return vm_create_guest_memfd(vm, GMEM_NPAGES * getpagesize(), GMEM_FLAGS);
}

static bool have_shared_gmem(void)
{
	return kvm_has_cap(KVM_CAP_GUEST_MEMFD) &&
	       (kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GMEM_FLAGS) == GMEM_FLAGS;
}

/*
 * Several vCPUs count in their own word of every page, again and again.  The
 * threads that run them resolve the userfaults, while the test toggles.
 */
struct counting_vm {
	struct userfault_slot slot;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	unsigned long filled[DIV_ROUND_UP(TEST_NPAGES, BITS_PER_BITMAP_WORD)];
	bool all_filled;
};

struct counter {
	struct counting_vm *cvm;
	pthread_t thread;
	int index;
};

FIXTURE(running) {
	struct counting_vm cvm;
};

FIXTURE_VARIANT(running) {
	enum vm_mem_backing_src_type src_type;
	bool gmem;
	bool elsewhere;
};

FIXTURE_VARIANT_ADD(running, anonymous) {
	.src_type = VM_MEM_SRC_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(running, shmem) {
	.src_type = VM_MEM_SRC_SHMEM,
};

FIXTURE_VARIANT_ADD(running, shmem_elsewhere) {
	.src_type = VM_MEM_SRC_SHMEM,
	.elsewhere = true,
};

FIXTURE_VARIANT_ADD(running, guest_memfd) {
	.gmem = true,
};

static bool guest_stop;

static void guest_count(u64 base, u64 npages, u64 page_size)
{
	u64 passes = 0;
	u64 *word;
	u64 i;

	do {
		for (i = 0; i < npages; i++) {
			word = (u64 *)(base + i * page_size);
			WRITE_ONCE(*word, READ_ONCE(*word) + 1);
		}
		passes++;
	} while (!READ_ONCE(guest_stop));

	GUEST_SYNC(passes);
}

FIXTURE_SETUP(running)
{
	struct userfault_slot *slot = &self->cvm.slot;
	struct kvm_vm *vm;
	int i;

	if (variant->gmem && !have_shared_gmem())
		SKIP(return, "no guest_memfd that can be mapped");

	vm = vm_create_with_vcpus(NR_VCPUS, guest_count, self->cvm.vcpus);
	if (variant->gmem)
		gmem_slot_add(slot, vm, gmem_create(vm), 0);
	else
		userfault_slot_add(slot, vm, variant->src_type, USERFAULT_GPA, TEST_NPAGES);
	if (variant->elsewhere)
		slot->vcpu_addr = (u64)slot->mem;

	memset(slot->mem, 0xee, TEST_NPAGES * slot->page_size);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_args_set(self->cvm.vcpus[i], 3, slot->gpa + i * sizeof(u64),
			      TEST_NPAGES, slot->page_size);
}

FIXTURE_TEARDOWN(running)
{
	kvm_vm_free(self->cvm.slot.vm);
}

static u64 counter_start(u64 page, int index)
{
	return userfault_pattern(page) << 32 | index << 24;
}

/* Whoever claims a page fills it and publishes it: all others try again. */
static void resolve_userfault(struct counting_vm *cvm, u64 page)
{
	unsigned long bit = 1UL << (page % BITS_PER_BITMAP_WORD);
	u64 *mem = userfault_page(&cvm->slot, page);
	int i;

	if (__atomic_fetch_or(&cvm->filled[page / BITS_PER_BITMAP_WORD], bit,
			      __ATOMIC_ACQ_REL) & bit) {
		if (READ_ONCE(cvm->all_filled))
			userfault_publish(&cvm->slot, page);
		return;
	}

	for (i = 0; i < NR_VCPUS; i++)
		mem[i] = counter_start(page, i);
	userfault_publish(&cvm->slot, page);
}

static void *vcpu_thread(void *arg)
{
	struct counter *counter = arg;
	struct userfault_slot *slot = &counter->cvm->slot;
	struct kvm_vcpu *vcpu = counter->cvm->vcpus[counter->index];
	u64 page;
	int r;

	while ((r = run_marked(vcpu))) {
		page = (vcpu->run->memory_fault.gpa - slot->gpa) / slot->page_size;
		assert_memory_fault(vcpu, r, userfault_gpa(slot, page), slot->page_size,
				    KVM_MEMORY_EXIT_FLAG_USERFAULT);
		TEST_ASSERT(page < TEST_NPAGES, "Fault should be in the slot, got gpa 0x%llx",
			    vcpu->run->memory_fault.gpa);
		resolve_userfault(counter->cvm, page);
	}

	return NULL;
}

static void wait_for_clear(struct userfault_slot *slot)
{
	int i;

	for (i = 0; i < DIV_ROUND_UP(TEST_NPAGES, BITS_PER_BITMAP_WORD); i++) {
		while (__atomic_load_n(&slot->bitmap[i], __ATOMIC_ACQUIRE))
			usleep(100);
	}
}

/* Have KVM's MMU notifier unmap the pages, which remain in the file. */
static void unmap_elsewhere(struct userfault_slot *slot)
{
	if (slot->vcpu_addr)
		TEST_ASSERT_EQ(madvise((void *)slot->vcpu_addr,
				       slot->npages * slot->page_size, MADV_DONTNEED), 0);
}

/* Off with all bits clear, and off with some still set. */
static void toggle_under_load(struct userfault_slot *slot)
{
	int i;

	for (i = 0; i < NR_TOGGLES; i++) {
		userfault_off(slot);
		unmap_elsewhere(slot);
		userfault_set_all(slot);
		userfault_on(slot);
		unmap_elsewhere(slot);
		if (i & 1)
			wait_for_clear(slot);
	}
	userfault_off(slot);
}

static void assert_counts(struct counting_vm *cvm, int index)
{
	struct ucall uc;
	u64 cmd = get_ucall(cvm->vcpus[index], &uc);
	u64 want, got;
	u64 page;

	TEST_ASSERT(cmd == UCALL_SYNC,
		    "Guest should report its passes, got ucall %lu, exit reason %u (%s)",
		    cmd, cvm->vcpus[index]->run->exit_reason,
		    exit_reason_str(cvm->vcpus[index]->run->exit_reason));
	TEST_ASSERT(uc.args[1], "Guest should have done a pass");

	for (page = 0; page < TEST_NPAGES; page++) {
		want = counter_start(page, index) + uc.args[1];
		got = userfault_page(&cvm->slot, page)[index];
		TEST_ASSERT(got == want, "vCPU %d page %lu should hold 0x%lx, got 0x%lx",
			    index, page, want, got);
	}
}

TEST_F_TIMEOUT(running, toggling_loses_nothing, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->cvm.slot;
	struct counter counters[NR_VCPUS];
	int i;

	userfault_set_all(slot);
	userfault_on(slot);

	for (i = 0; i < NR_VCPUS; i++) {
		counters[i] = (struct counter) { .cvm = &self->cvm, .index = i };
		kvm_pthread_create(&counters[i].thread, NULL, vcpu_thread, &counters[i]);
	}

	wait_for_clear(slot);
	WRITE_ONCE(self->cvm.all_filled, true);
	toggle_under_load(slot);

	write_guest_global(slot->vm, guest_stop, true);
	for (i = 0; i < NR_VCPUS; i++) {
		kvm_pthread_join(counters[i].thread, NULL);
		assert_counts(&self->cvm, i);
	}
}

/* One vCPU, and one slot of a guest_memfd that userspace can map. */
FIXTURE(guest_memfd) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
	int fd;
};

FIXTURE_SETUP(guest_memfd)
{
	if (!have_shared_gmem())
		SKIP(return, "no guest_memfd that can be mapped");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code);
	self->fd = gmem_create(self->vm);
	gmem_slot_add(&self->slot, self->vm, self->fd, 0);
	userfault_fill_all(&self->slot);
}

FIXTURE_TEARDOWN(guest_memfd)
{
	kvm_vm_free(self->vm);
}

static void toggle(struct userfault_slot *slot)
{
	userfault_on(slot);
	userfault_off(slot);
}

static void punch_hole(struct userfault_slot *slot, int fd, u64 page)
{
	kvm_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      gmem_offset(slot) + page * slot->page_size, slot->page_size);
}

/* Drop every reference that the test has, the slot itself has none. */
static void gmem_close(struct userfault_slot *slot, int fd)
{
	struct userspace_mem_region *region = memslot2region(slot->vm, slot->id);

	kvm_munmap(slot->mem, slot->npages * slot->page_size);
	kvm_close(fd);
	kvm_free_fd(region->region.guest_memfd);
}

TEST_F(guest_memfd, toggle_and_run)
{
	struct userfault_slot *slot = &self->slot;
	u64 i;

	guest_read_filled(self->vcpu, slot, 0);
	for (i = 0; i < 3; i++) {
		userfault_set_all(slot);
		userfault_on(slot);
		guest_read_faults(self->vcpu, slot, i);
		guest_read_faults(self->vcpu, slot, TEST_NPAGES - 1);
		guest_read_filled(self->vcpu, slot, i);

		userfault_off(slot);
		guest_read_filled(self->vcpu, slot, TEST_NPAGES / 2);
		guest_access(self->vcpu, slot, GUEST_WRITE, i, i + 1);
		TEST_ASSERT_EQ(*userfault_page(slot, i), i + 1);
	}
}

TEST_F(guest_memfd, holes_reach_the_new_slot)
{
	struct userfault_slot *slot = &self->slot;

	toggle(slot);
	guest_read_filled(self->vcpu, slot, 3);
	punch_hole(slot, self->fd, 3);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, 3, 0), 0);

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 4);
	userfault_set_bit(slot, 4);
	punch_hole(slot, self->fd, 4);
	guest_read_faults(self->vcpu, slot, 4);

	userfault_off(slot);
	guest_read_filled(self->vcpu, slot, 5);
	punch_hole(slot, self->fd, 5);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, 5, 0), 0);
}

/* @other_fd: another guest_memfd of the same size */
static void assert_immutable(struct kvm_vm *vm, u32 slot, u32 flags, int other_fd)
{
	struct kvm_userspace_memory_region2 region = memslot2region(vm, slot)->region;
	int fd = region.guest_memfd;

	region.flags = flags;
	region.guest_memfd = other_fd;
	assert_refused(vm, "other guest_memfd", region, EINVAL);
	region.guest_memfd = fd;

	region.guest_memfd_offset += getpagesize();
	assert_refused(vm, "other offset", region, EINVAL);
	region.guest_memfd_offset -= getpagesize();

	region.guest_phys_addr += SZ_1G;
	assert_refused(vm, "moved", region, EINVAL);
	region.guest_phys_addr -= SZ_1G;

	region.memory_size += getpagesize();
	assert_refused(vm, "resized", region, EINVAL);
	region.memory_size -= getpagesize();

	region.userspace_addr += getpagesize();
	assert_refused(vm, "other userspace address", region, EINVAL);
	region.userspace_addr -= getpagesize();

	region.flags ^= KVM_MEM_READONLY;
	assert_refused(vm, "made read-only", region, EINVAL);
	region.flags = flags & ~KVM_MEM_GUEST_MEMFD;
	assert_refused(vm, "without guest_memfd", region, EINVAL);
}

TEST_F(guest_memfd, only_the_flag_can_change)
{
	u32 id = self->slot.id;
	int fd = gmem_create(self->vm);

	/* As it is now, and as it may become. */
	assert_immutable(self->vm, id, KVM_MEM_GUEST_MEMFD, fd);
	assert_immutable(self->vm, id, KVM_MEM_GUEST_MEMFD | KVM_MEM_USERFAULT, fd);

	userfault_on(&self->slot);
	assert_immutable(self->vm, id, KVM_MEM_GUEST_MEMFD | KVM_MEM_USERFAULT, fd);
	assert_immutable(self->vm, id, KVM_MEM_GUEST_MEMFD, fd);
	guest_read_filled(self->vcpu, &self->slot, 0);

	assert_refused(self->vm, "unchanged", memslot2region(self->vm, id)->region, EINVAL);
	kvm_close(fd);
}

TEST_F(guest_memfd, delete_then_close)
{
	struct userfault_slot *slot = &self->slot;

	toggle(slot);
	guest_read_filled(self->vcpu, slot, 0);
	vm_mem_region_delete(self->vm, slot->id);

	punch_hole(slot, self->fd, 0);
	kvm_munmap(slot->mem, slot->npages * slot->page_size);
	kvm_close(self->fd);
}

TEST_F(guest_memfd, delete_while_on_then_close)
{
	struct userfault_slot *slot = &self->slot;

	toggle(slot);
	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 0);
	vm_mem_region_delete(self->vm, slot->id);

	punch_hole(slot, self->fd, 0);
	kvm_munmap(slot->mem, slot->npages * slot->page_size);
	kvm_close(self->fd);
}

TEST_F(guest_memfd, close_then_delete)
{
	struct userfault_slot *slot = &self->slot;

	toggle(slot);
	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 0);
	gmem_close(slot, self->fd);

	/* The release has to reach the new slot: there is nothing to map now. */
	guest_prepare(slot, GUEST_READ, 0, 0);
	run_to_fault(self->vcpu, slot, 0, 0);
	userfault_set_bit(slot, 0);
	run_to_userfault(self->vcpu, slot, 0);
	vm_mem_region_delete(self->vm, slot->id);
}

TEST_F(guest_memfd, slots_of_one_file_are_independent)
{
	struct userfault_slot *slot = &self->slot;
	struct userfault_slot other;

	gmem_slot_add(&other, self->vm, self->fd, 1);
	userfault_fill_all(&other);
	toggle(&other);
	userfault_set_all(&other);
	userfault_on(&other);

	guest_read_filled(self->vcpu, slot, TEST_NPAGES - 1);
	guest_read_faults(self->vcpu, &other, 0);
	toggle(slot);
	guest_read_filled(self->vcpu, slot, TEST_NPAGES - 1);
	guest_read_filled(self->vcpu, &other, 0);

	punch_hole(&other, self->fd, 0);
	punch_hole(slot, self->fd, TEST_NPAGES - 1);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, TEST_NPAGES - 1, 0), 0);
	TEST_ASSERT_EQ(guest_access(self->vcpu, &other, GUEST_READ, 0, 0), 0);

	vm_mem_region_delete(self->vm, slot->id);
	guest_read_faults(self->vcpu, &other, 1);
}

TEST_F(guest_memfd, binding_is_one_and_goes_with_the_slot)
{
	struct userfault_slot *slot = &self->slot;
	struct kvm_userspace_memory_region2 region;

	toggle(slot);
	region = memslot2region(self->vm, slot->id)->region;
	region.guest_memfd = self->fd;
	region.slot++;
	region.guest_phys_addr += SZ_1G;
	assert_refused(self->vm, "bound twice", region, EEXIST);

	userfault_on(slot);
	assert_refused(self->vm, "bound twice while on", region, EEXIST);

	/* Another slot can have it once this one is gone, and be born with the flag. */
	vm_mem_region_delete(self->vm, slot->id);
	region.slot--;
	region.guest_phys_addr -= SZ_1G;
	region.flags |= KVM_MEM_USERFAULT;
	region.userfault_bitmap = (u64)slot->bitmap;
	region.userspace_addr = (u64)slot->mem;
	vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region);

	userfault_set_bit(slot, 1);
	guest_read_filled(self->vcpu, slot, 0);
	guest_read_faults(self->vcpu, slot, 1);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
