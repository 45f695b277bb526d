// SPDX-License-Identifier: GPL-2.0
/*
 * Test KVM Userfault together with dirty logging, which also works page by page
 * and is turned on and off by a flag of the memslot: neither may undo, or start
 * over, what the other one has set up.
 */
#include "kvm_userfault_util.h"
#include "processor.h"

#include "kvm_test_harness.h"

#define TEST_NPAGES	96
/* A ring has at least a page. */
#define RING_ENTRIES	(SZ_64K / sizeof(struct kvm_dirty_gfn))

struct dirty_vm {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
	bool manual_protect;
	bool ring;
	u32 ring_index;
};

struct dirty_pages {
	unsigned long bits[DIV_ROUND_UP(TEST_NPAGES, BITS_PER_BITMAP_WORD)];
};

FIXTURE(dirty) {
	struct dirty_vm dvm;
};

FIXTURE_VARIANT(dirty) {
	bool ring;
	bool guest_memfd;
	u64 manual_protect;
};

FIXTURE_VARIANT_ADD(dirty, log) {
	.ring = false,
};

FIXTURE_VARIANT_ADD(dirty, log_manual_protect) {
	.manual_protect = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

FIXTURE_VARIANT_ADD(dirty, log_initially_set) {
	.manual_protect = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
};

FIXTURE_VARIANT_ADD(dirty, ring) {
	.ring = true,
};

FIXTURE_VARIANT_ADD(dirty, log_guest_memfd) {
	.guest_memfd = true,
};

FIXTURE_VARIANT_ADD(dirty, log_initially_set_guest_memfd) {
	.guest_memfd = true,
	.manual_protect = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
};

FIXTURE_VARIANT_ADD(dirty, ring_guest_memfd) {
	.guest_memfd = true,
	.ring = true,
};

FIXTURE_SETUP(dirty)
{
	struct dirty_vm *dvm = &self->dvm;
	u64 manual = variant->manual_protect;

	if (variant->ring && !kvm_has_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
		SKIP(return, "no dirty ring");
	if (variant->guest_memfd && !kvm_has_cap(KVM_CAP_GUEST_MEMFD_DIRTY_LOG))
		SKIP(return, "no dirty log for guest_memfd");
	if ((kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & manual) != manual)
		SKIP(return, "no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 of this kind");

	dvm->manual_protect = manual;
	dvm->ring = variant->ring;
	dvm->vm = vm_create(1);
	if (variant->ring)
		vm_enable_dirty_ring(dvm->vm, RING_ENTRIES * sizeof(struct kvm_dirty_gfn));
	if (manual)
		vm_enable_cap(dvm->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual);
	dvm->vcpu = vm_vcpu_add(dvm->vm, 0, userfault_guest_code);
	kvm_arch_vm_finalize_vcpus(dvm->vm);

	userfault_slot_add(&dvm->slot, dvm->vm,
			   variant->guest_memfd ? VM_MEM_SRC_GUEST_MEMFD :
						  VM_MEM_SRC_ANONYMOUS,
			   USERFAULT_GPA, TEST_NPAGES);
	userfault_fill_all(&dvm->slot);
}

FIXTURE_TEARDOWN(dirty)
{
	kvm_vm_free(self->dvm.vm);
}

static void mark(struct dirty_pages *dirty, u64 page)
{
	TEST_ASSERT(page < TEST_NPAGES, "Page %lu should be in the slot", page);
	dirty->bits[page / BITS_PER_BITMAP_WORD] |= 1UL << (page % BITS_PER_BITMAP_WORD);
}

static bool is_marked(struct dirty_pages *dirty, u64 page)
{
	return dirty->bits[page / BITS_PER_BITMAP_WORD] & 1UL << (page % BITS_PER_BITMAP_WORD);
}

/* Take what is in the ring; pages of the guest's own slot are not logged. */
static void collect_ring(struct dirty_vm *dvm, struct dirty_pages *dirty)
{
	struct kvm_dirty_gfn *gfns = vcpu_map_dirty_ring(dvm->vcpu);
	struct kvm_dirty_gfn *gfn;

	for (;;) {
		gfn = &gfns[dvm->ring_index % RING_ENTRIES];
		if (!(__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			break;
		TEST_ASSERT_EQ(gfn->slot, dvm->slot.id);
		mark(dirty, gfn->offset);
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		dvm->ring_index++;
	}
	kvm_vm_reset_dirty_ring(dvm->vm);
}

static void collect(struct dirty_vm *dvm, struct dirty_pages *dirty)
{
	memset(dirty, 0, sizeof(*dirty));
	if (dvm->ring) {
		collect_ring(dvm, dirty);
		return;
	}

	kvm_vm_get_dirty_log(dvm->vm, dvm->slot.id, dirty->bits);
	if (dvm->manual_protect)
		kvm_vm_clear_dirty_log(dvm->vm, dvm->slot.id, dirty->bits, 0, TEST_NPAGES);
}

static void assert_dirty_is_only(struct dirty_pages *dirty, u64 first, u64 second)
{
	u64 i;

	for (i = 0; i < TEST_NPAGES; i++) {
		bool want = i == first || i == second;

		TEST_ASSERT(is_marked(dirty, i) == want,
			    "Page %lu should be %s after writes to pages %lu and %lu",
			    i, want ? "dirty" : "clean", first, second);
	}
}

/*
 * What has to be so with the flags as they are: a write to a page with a set bit
 * exits or not, and all that is written, and nothing else, is logged.
 */
static void check_state(struct dirty_vm *dvm, u32 flags, u64 page)
{
	struct userfault_slot *slot = &dvm->slot;
	u64 other = page + 1;
	struct dirty_pages dirty;

	if (flags & KVM_MEM_LOG_DIRTY_PAGES)
		collect(dvm, &dirty);

	/* A page that is there, and one whose bit is set. */
	userfault_publish(slot, other);
	guest_access(dvm->vcpu, slot, GUEST_WRITE, other, userfault_pattern(other));
	userfault_set_bit(slot, page);
	guest_prepare(slot, GUEST_WRITE, page, userfault_pattern(page));
	if (flags & KVM_MEM_USERFAULT) {
		run_to_userfault(dvm->vcpu, slot, page);
		userfault_publish(slot, page);
	}
	run_to_done(dvm->vcpu);

	if (flags & KVM_MEM_LOG_DIRTY_PAGES) {
		collect(dvm, &dirty);
		assert_dirty_is_only(&dirty, page, other);

		/* Reads are not logged, and a second write is. */
		guest_read_filled(dvm->vcpu, slot, page);
		guest_access(dvm->vcpu, slot, GUEST_WRITE, other, userfault_pattern(other));
		collect(dvm, &dirty);
		assert_dirty_is_only(&dirty, other, other);
	}
}

/* Each way from one combination of the two flags to another, once. */
TEST_F_TIMEOUT(dirty, every_transition, USERFAULT_TIMEOUT)
{
	const u32 flags[] = { 0, KVM_MEM_USERFAULT, KVM_MEM_LOG_DIRTY_PAGES,
			      KVM_MEM_USERFAULT | KVM_MEM_LOG_DIRTY_PAGES };
	const int tour[] = { 0, 1, 2, 3, 0, 2, 1, 3, 1, 0, 3, 2, 0 };
	struct userfault_slot *slot = &self->dvm.slot;
	u64 page = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(tour); i++) {
		userfault_set_all(slot);
		/* The first is what it is; guest_memfd slots refuse to change nothing. */
		if (i)
			userfault_slot_set_flags(slot, flags[tour[i]]);
		check_state(&self->dvm, flags[tour[i]], page);
		page += 2;
	}
}

/* What was logged before userfault is toggled is still logged after that. */
TEST_F_TIMEOUT(dirty, toggling_userfault_keeps_the_log, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->dvm.slot;
	struct dirty_pages dirty;

	slot->base_flags |= KVM_MEM_LOG_DIRTY_PAGES;
	userfault_off(slot);
	collect(&self->dvm, &dirty);

	guest_access(self->dvm.vcpu, slot, GUEST_WRITE, 10, 1);
	userfault_on(slot);
	guest_access(self->dvm.vcpu, slot, GUEST_WRITE, 20, 1);
	userfault_off(slot);
	collect(&self->dvm, &dirty);
	assert_dirty_is_only(&dirty, 10, 20);
}

/* A page that is write-protected for the log, and whose bit gets set, exits. */
TEST_F_TIMEOUT(dirty, write_to_a_protected_page_exits, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->dvm.slot;
	struct dirty_pages dirty;
	int exits = 0;

	slot->base_flags |= KVM_MEM_LOG_DIRTY_PAGES;
	userfault_on(slot);
	collect(&self->dvm, &dirty);
	guest_access(self->dvm.vcpu, slot, GUEST_WRITE, 30, 1);
	collect(&self->dvm, &dirty);

	/*
	 * x86 may make it writable at once, or take the long way and see the bit.
	 * arm64 always takes the long way, but doesn't protect pages for the ring.
	 */
	userfault_set_bit(slot, 30);
	guest_prepare(slot, GUEST_WRITE, 30, 2);
	while (run_marked(self->dvm.vcpu)) {
		assert_memory_fault(self->dvm.vcpu, -1, userfault_gpa(slot, 30), slot->page_size,
				    KVM_MEMORY_EXIT_FLAG_USERFAULT);
		userfault_publish(slot, 30);
		exits++;
	}
#ifdef __aarch64__
	if (!variant->ring)
		TEST_ASSERT_EQ(exits, 1);
#else
	TEST_ASSERT(exits <= 1, "should exit once at most, got %d exits", exits);
#endif
	collect(&self->dvm, &dirty);
	assert_dirty_is_only(&dirty, 30, 30);
}

#ifdef __aarch64__
/* x86 may map a page writable when it is read, and logs it then. */
TEST_F_TIMEOUT(dirty, first_read_is_not_logged, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->dvm.slot;
	struct dirty_pages dirty;

	if (variant->ring)
		SKIP(return, "with the ring, arm64 maps pages writable as well");

	slot->base_flags |= KVM_MEM_LOG_DIRTY_PAGES;
	userfault_off(slot);
	collect(&self->dvm, &dirty);

	guest_read_filled(self->dvm.vcpu, slot, 40);
	guest_access(self->dvm.vcpu, slot, GUEST_WRITE, 50, 1);
	collect(&self->dvm, &dirty);
	assert_dirty_is_only(&dirty, 50, 50);
}
#endif

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
