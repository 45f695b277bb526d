/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Helpers for the tests of KVM Userfault: memslots with a userfault bitmap, and
 * a guest that makes one access at a time on behalf of the test.
 */
#ifndef SELFTEST_KVM_USERFAULT_UTIL_H
#define SELFTEST_KVM_USERFAULT_UTIL_H

#include <linux/sizes.h>

#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

/* Above slot 0, above the PCI hole, and aligned for huge pages. */
#define USERFAULT_GPA		((gpa_t)SZ_4G)
#define USERFAULT_SLOT		10

/* In seconds: the harness's default is too short for many vCPUs in an emulator. */
#define USERFAULT_TIMEOUT	240

#define BITS_PER_BITMAP_WORD	(sizeof(unsigned long) * 8)

/* An exit reason that KVM never sets, to see that KVM set none. */
#define EXIT_REASON_MARKER	0xdeadu

/*
 * A memslot under test.  @mem is what userspace fills pages through, which for
 * shared memory is a different mapping than the one that KVM knows.
 */
struct userfault_slot {
	struct kvm_vm *vm;
	u32 id;
	u32 base_flags;		/* Flags that stay on when userfault goes off */
	gpa_t gpa;
	u64 npages;
	u64 page_size;		/* The host's, which is what a bit stands for */
	u8 *mem;
	u64 vcpu_addr;		/* Where vCPUs' pages are looked up, 0 for as usual */
	unsigned long *bitmap;
	size_t bitmap_size;	/* Of the mapping, in bytes */
};

enum guest_op {
	GUEST_READ,	/* Returns the first word of the page */
	GUEST_WRITE,	/* Sets the first word of the page */
	GUEST_EXEC,	/* Calls the page, returns what it returned */
	GUEST_SWEEP,	/* Reads @val pages, returns the sum of their words */
};

struct guest_cmd {
	u64 op;
	u64 gva;
	u64 val;
	u64 page_size;
};

static struct guest_cmd guest_cmd;

static inline u64 guest_do_op(struct guest_cmd *cmd)
{
	u64 sum = 0;
	u64 i;

	switch (cmd->op) {
	case GUEST_READ:
		return READ_ONCE(*(u64 *)cmd->gva);
	case GUEST_WRITE:
		WRITE_ONCE(*(u64 *)cmd->gva, cmd->val);
		return cmd->val;
	case GUEST_EXEC:
		return ((u64 (*)(void))cmd->gva)();
	case GUEST_SWEEP:
		for (i = 0; i < cmd->val; i++)
			sum += READ_ONCE(*(u64 *)(cmd->gva + i * cmd->page_size));
		return sum;
	}
	GUEST_FAIL("Unknown op %lu", cmd->op);
	return 0;
}

static inline void userfault_guest_code(void)
{
	for (;;)
		GUEST_SYNC(guest_do_op(&guest_cmd));
}

static inline size_t userfault_bitmap_bytes(u64 npages)
{
	return DIV_ROUND_UP(npages, BITS_PER_BITMAP_WORD) * sizeof(unsigned long);
}

/* Bits are plain words to KVM: set and clear them whole, and atomically. */
static inline void userfault_set_bit(struct userfault_slot *slot, u64 page)
{
	__atomic_fetch_or(&slot->bitmap[page / BITS_PER_BITMAP_WORD],
			  1UL << (page % BITS_PER_BITMAP_WORD), __ATOMIC_RELAXED);
}

static inline bool userfault_bit_is_set(struct userfault_slot *slot, u64 page)
{
	return __atomic_load_n(&slot->bitmap[page / BITS_PER_BITMAP_WORD], __ATOMIC_ACQUIRE) &
	       1UL << (page % BITS_PER_BITMAP_WORD);
}

/* Publish a page: whatever was written to it before is visible to the guest. */
static inline void userfault_publish(struct userfault_slot *slot, u64 page)
{
	__atomic_fetch_and(&slot->bitmap[page / BITS_PER_BITMAP_WORD],
			   ~(1UL << (page % BITS_PER_BITMAP_WORD)), __ATOMIC_RELEASE);
}

static inline void userfault_set_all(struct userfault_slot *slot)
{
	u64 i;

	for (i = 0; i < slot->npages; i++)
		userfault_set_bit(slot, i);
}

static inline void userfault_clear_all(struct userfault_slot *slot)
{
	u64 i;

	for (i = 0; i < slot->npages; i++)
		userfault_publish(slot, i);
}

static inline u64 *userfault_page(struct userfault_slot *slot, u64 page)
{
	return (u64 *)(slot->mem + page * slot->page_size);
}

static inline gpa_t userfault_gpa(struct userfault_slot *slot, u64 page)
{
	return slot->gpa + page * slot->page_size;
}

/* The word that a filled page begins with. */
static inline u64 userfault_pattern(u64 page)
{
	return 0x5eed0000ull + page;
}

static inline void userfault_fill(struct userfault_slot *slot, u64 page)
{
	u64 *mem = userfault_page(slot, page);

	memset(mem, 0, slot->page_size);
	*mem = userfault_pattern(page);
}

static inline void userfault_fill_all(struct userfault_slot *slot)
{
	u64 i;

	for (i = 0; i < slot->npages; i++)
		userfault_fill(slot, i);
}

static inline void userfault_slot_init(struct userfault_slot *slot,
				       struct kvm_vm *vm, gpa_t gpa, u64 npages)
{
	slot->vm = vm;
	slot->id = USERFAULT_SLOT;
	slot->base_flags = 0;
	slot->gpa = gpa;
	slot->npages = npages;
	slot->page_size = getpagesize();
	slot->vcpu_addr = 0;
	slot->bitmap_size = align_up(userfault_bitmap_bytes(npages), slot->page_size);
	slot->bitmap = kvm_mmap(slot->bitmap_size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

/* Add a slot with all bits clear and the flag off. */
static inline void __userfault_slot_add(struct userfault_slot *slot,
					struct kvm_vm *vm,
					enum vm_mem_backing_src_type src_type,
					gpa_t gpa, u64 npages, u32 flags)
{
	u64 guest_npages = vm_calc_num_guest_pages(vm->mode, npages * getpagesize());

	userfault_slot_init(slot, vm, gpa, npages);
	slot->base_flags = flags;
	if (src_type == VM_MEM_SRC_GUEST_MEMFD)
		slot->base_flags |= KVM_MEM_GUEST_MEMFD;
	vm_userspace_mem_region_add(vm, src_type, gpa, slot->id, guest_npages, flags);

	if (backing_src_is_shared(src_type))
		slot->mem = addr_gpa2alias(vm, gpa);
	else
		slot->mem = addr_gpa2hva(vm, gpa);
}

/* Identity map the slot in the guest's page tables. */
static inline void userfault_slot_map(struct userfault_slot *slot)
{
	virt_map(slot->vm, slot->gpa, slot->gpa,
		 vm_calc_num_guest_pages(slot->vm->mode, slot->npages * slot->page_size));
}

static inline void userfault_slot_add(struct userfault_slot *slot,
				      struct kvm_vm *vm,
				      enum vm_mem_backing_src_type src_type,
				      gpa_t gpa, u64 npages)
{
	__userfault_slot_add(slot, vm, src_type, gpa, npages, 0);
	userfault_slot_map(slot);
}

static inline void userfault_slot_set_flags(struct userfault_slot *slot, u32 flags)
{
	memslot2region(slot->vm, slot->id)->region.userfault_bitmap = (u64)slot->bitmap;
	vm_mem_region_set_flags(slot->vm, slot->id, slot->base_flags | flags);
}

static inline void userfault_on(struct userfault_slot *slot)
{
	memslot2region(slot->vm, slot->id)->region.userfault_addr = slot->vcpu_addr;
	userfault_slot_set_flags(slot, KVM_MEM_USERFAULT |
				       (slot->vcpu_addr ? KVM_MEM_USERFAULT_ADDR : 0));
}

static inline void userfault_off(struct userfault_slot *slot)
{
	userfault_slot_set_flags(slot, 0);
}

static inline void assert_refused(struct kvm_vm *vm, const char *what,
				  struct kvm_userspace_memory_region2 region, int err)
{
	int r = __vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);

	TEST_ASSERT(r == -1 && errno == err, "%s: should fail with errno %d, got %d errno %d",
		    what, err, r, errno);
}

static inline bool have_hugetlb(size_t size)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	if (mem == MAP_FAILED)
		return false;

	kvm_munmap(mem, size);
	return true;
}

/* Tell the guest what to do next; the vCPU has to be run to do it. */
static inline void guest_prepare(struct userfault_slot *slot, enum guest_op op,
				 u64 page, u64 val)
{
	struct guest_cmd cmd = {
		.op = op,
		.gva = userfault_gpa(slot, page),
		.val = val,
		.page_size = slot->page_size,
	};

	write_guest_global(slot->vm, guest_cmd, cmd);
}

static inline int run_marked(struct kvm_vcpu *vcpu)
{
	int r;

	do {
		vcpu->run->exit_reason = EXIT_REASON_MARKER;
		r = __vcpu_run(vcpu);
	} while (r == -1 && errno == EINTR);

	return r;
}

/* Run until the guest has done what it was told, without a fault on the way. */
static inline u64 run_to_done(struct kvm_vcpu *vcpu)
{
	struct ucall uc;
	int r = run_marked(vcpu);

	TEST_ASSERT(!r,
		    "KVM_RUN should complete the access, got %d errno %d, exit reason %u (%s), gpa 0x%llx flags 0x%llx",
		    r, errno, vcpu->run->exit_reason,
		    exit_reason_str(vcpu->run->exit_reason),
		    vcpu->run->memory_fault.gpa, vcpu->run->memory_fault.flags);

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		return uc.args[1];
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("Guest should report a finished access, got ucall %lu, exit reason %u",
			  uc.cmd, vcpu->run->exit_reason);
	}
}

/* Run until the guest says that it is done for good. */
static inline void run_to_the_end(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	TEST_ASSERT_EQ(run_marked(vcpu), 0);
	switch (get_ucall(vcpu, &uc)) {
	case UCALL_DONE:
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("The guest should be done, got ucall %lu", uc.cmd);
	}
}

static inline void assert_memory_fault(struct kvm_vcpu *vcpu, int r, gpa_t gpa,
				       u64 size, u64 flags)
{
	struct kvm_run *run = vcpu->run;

	TEST_ASSERT(r == -1 && errno == EFAULT,
		    "KVM_RUN should fail with EFAULT, got %d errno %d", r, errno);
	TEST_ASSERT(run->exit_reason == KVM_EXIT_MEMORY_FAULT,
		    "Exit reason should be MEMORY_FAULT, got %u (%s)",
		    run->exit_reason, exit_reason_str(run->exit_reason));
	TEST_ASSERT(run->memory_fault.gpa == gpa &&
		    run->memory_fault.size == size &&
		    run->memory_fault.flags == flags,
		    "Fault should be gpa 0x%lx size 0x%lx flags 0x%lx, got gpa 0x%llx size 0x%llx flags 0x%llx",
		    gpa, size, flags, run->memory_fault.gpa,
		    run->memory_fault.size, run->memory_fault.flags);
}

static inline void run_to_fault(struct kvm_vcpu *vcpu, struct userfault_slot *slot,
				u64 page, u64 flags)
{
	int r = run_marked(vcpu);

	assert_memory_fault(vcpu, r, userfault_gpa(slot, page), slot->page_size, flags);
}

static inline void run_to_userfault(struct kvm_vcpu *vcpu,
				    struct userfault_slot *slot, u64 page)
{
	run_to_fault(vcpu, slot, page, KVM_MEMORY_EXIT_FLAG_USERFAULT);
}

static inline u64 guest_access(struct kvm_vcpu *vcpu, struct userfault_slot *slot,
			       enum guest_op op, u64 page, u64 val)
{
	guest_prepare(slot, op, page, val);
	return run_to_done(vcpu);
}

static inline void guest_read_filled(struct kvm_vcpu *vcpu,
				     struct userfault_slot *slot, u64 page)
{
	u64 val = guest_access(vcpu, slot, GUEST_READ, page, 0);

	TEST_ASSERT(val == userfault_pattern(page),
		    "Guest should read 0x%lx from page %lu, got 0x%lx",
		    userfault_pattern(page), page, val);
}

/* An access that exits once, is filled and published, and then goes on. */
static inline void guest_read_faults(struct kvm_vcpu *vcpu,
				     struct userfault_slot *slot, u64 page)
{
	guest_prepare(slot, GUEST_READ, page, 0);
	run_to_userfault(vcpu, slot, page);
	userfault_fill(slot, page);
	userfault_publish(slot, page);
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(page));
}

#ifdef __aarch64__

/* Of the Arm paravirtualized time specification, DEN0057 */
#define PV_TIME_ST		0xc5000021

/* In the guest: KVM says where it keeps stolen time, and writes it there. */
static inline u64 guest_get_steal_time(void)
{
	struct arm_smccc_res res;

	do_smccc(PV_TIME_ST, 0, 0, 0, 0, 0, 0, 0, &res);
	return res.a0;
}

/* Returns false if KVM has no steal time. */
static inline bool vcpu_set_steal_time(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct kvm_device_attr dev = {
		.group = KVM_ARM_VCPU_PVTIME_CTRL,
		.attr = KVM_ARM_VCPU_PVTIME_IPA,
		.addr = (u64)&ipa,
	};

	if (__vcpu_ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &dev))
		return false;

	vcpu_ioctl(vcpu, KVM_SET_DEVICE_ATTR, &dev);
	return true;
}

#endif

#endif /* SELFTEST_KVM_USERFAULT_UTIL_H */
