// SPDX-License-Identifier: GPL-2.0
/*
 * Test KVM Userfault: a bit set in the bitmap of a memslot turns a vCPU's access
 * to that page into an exit.
 */
#include <sys/mount.h>
#include <sys/prctl.h>
#include <fcntl.h>
#include <pthread.h>

#include "kvm_userfault_util.h"
#include "processor.h"

#include "kvm_test_harness.h"

/* Neither a multiple of the bits in a word, nor beginning at one. */
#define TEST_NPAGES	131
#define TEST_GFN_OFFSET	3

#define TRACEFS		"/sys/kernel/tracing/"
/* A trace of our own */
#define TRACE		TRACEFS "instances/kvm_userfault_test/"

/*
 * One vCPU and one slot per backing.  Each test runs in a process of its own.
 */
FIXTURE(backing) {
	struct kvm_vcpu *vcpu;
	struct userfault_slot slot;
};

FIXTURE_VARIANT(backing) {
	enum vm_mem_backing_src_type src_type;
	bool elsewhere;
};

FIXTURE_VARIANT_ADD(backing, anonymous) {
	.src_type = VM_MEM_SRC_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(backing, shmem) {
	.src_type = VM_MEM_SRC_SHMEM,
};

FIXTURE_VARIANT_ADD(backing, shmem_elsewhere) {
	.src_type = VM_MEM_SRC_SHMEM,
	.elsewhere = true,
};

FIXTURE_VARIANT_ADD(backing, hugetlb) {
	.src_type = VM_MEM_SRC_SHARED_HUGETLB,
};

FIXTURE_VARIANT_ADD(backing, hugetlb_elsewhere) {
	.src_type = VM_MEM_SRC_SHARED_HUGETLB,
	.elsewhere = true,
};

FIXTURE_SETUP(backing)
{
	size_t size = SZ_2M;

	if (variant->src_type == VM_MEM_SRC_SHARED_HUGETLB) {
		size = get_def_hugetlb_pagesz();
		if (!have_hugetlb(size))
			SKIP(return, "no free huge page of the default size");
	}

	userfault_slot_add(&self->slot, vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code),
			   variant->src_type, USERFAULT_GPA, size / getpagesize());
	if (variant->elsewhere)
		self->slot.vcpu_addr = (u64)self->slot.mem;
	userfault_set_all(&self->slot);
	userfault_on(&self->slot);
}

FIXTURE_TEARDOWN(backing)
{
	kvm_vm_free(self->vcpu->vm);
}

TEST_F(backing, read_exits)
{
	guest_read_faults(self->vcpu, &self->slot, 0);
	guest_read_faults(self->vcpu, &self->slot, 5);
}

TEST_F(backing, write_exits)
{
	struct userfault_slot *slot = &self->slot;

	guest_prepare(slot, GUEST_WRITE, 7, 0xabcd);
	run_to_userfault(self->vcpu, slot, 7);
	TEST_ASSERT(*userfault_page(slot, 7) == 0,
		    "Page should be untouched by a write that exits, got 0x%lx",
		    *userfault_page(slot, 7));

	userfault_fill(slot, 7);
	userfault_page(slot, 7)[1] = 0x1234;
	userfault_publish(slot, 7);
	run_to_done(self->vcpu);
	TEST_ASSERT_EQ(userfault_page(slot, 7)[0], 0xabcd);
	TEST_ASSERT_EQ(userfault_page(slot, 7)[1], 0x1234);
}

/* Write a function that returns @val. */
static void fill_function(struct userfault_slot *slot, u64 page, u16 val)
{
	u8 *mem = (u8 *)userfault_page(slot, page);

#if defined(__x86_64__)
	const u8 code[] = { 0xb8, val & 0xff, val >> 8, 0, 0, 0xc3 };
#elif defined(__aarch64__)
	const u32 code[] = { 0xd2800000 | (u32)val << 5, 0xd65f03c0 };
#else
#error "The code of a function is needed for this architecture"
#endif

	memcpy(mem, code, sizeof(code));
	__builtin___clear_cache((char *)mem, (char *)mem + sizeof(code));
}

TEST_F(backing, execute_exits)
{
	guest_prepare(&self->slot, GUEST_EXEC, 9, 0);
	run_to_userfault(self->vcpu, &self->slot, 9);
	fill_function(&self->slot, 9, 0x2a5);
	userfault_publish(&self->slot, 9);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0x2a5);
}

TEST_F(backing, exit_repeats_until_published)
{
	int i;

	guest_prepare(&self->slot, GUEST_READ, 3, 0);
	for (i = 0; i < 5; i++)
		run_to_userfault(self->vcpu, &self->slot, 3);

	userfault_fill(&self->slot, 3);
	userfault_publish(&self->slot, 3);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(3));
}

TEST_F(backing, neighbours_do_not_exit)
{
	userfault_fill(&self->slot, 10);
	userfault_fill(&self->slot, 12);
	userfault_publish(&self->slot, 10);
	userfault_publish(&self->slot, 12);

	guest_read_filled(self->vcpu, &self->slot, 10);
	guest_read_filled(self->vcpu, &self->slot, 12);
	guest_read_faults(self->vcpu, &self->slot, 11);
}

/* One vCPU, one slot of anonymous memory, all bits clear and the flag off. */
FIXTURE(userfault) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
};

FIXTURE_SETUP(userfault)
{
	self->vm = vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code);
	userfault_slot_add(&self->slot, self->vm, VM_MEM_SRC_ANONYMOUS,
			   USERFAULT_GPA + TEST_GFN_OFFSET * getpagesize(),
			   TEST_NPAGES);
	userfault_fill_all(&self->slot);
}

FIXTURE_TEARDOWN(userfault)
{
	kvm_vm_free(self->vm);
}

static u64 guest_sweep(struct kvm_vcpu *vcpu, struct userfault_slot *slot)
{
	return guest_access(vcpu, slot, GUEST_SWEEP, 0, slot->npages);
}

TEST_F(userfault, bit_n_is_page_n)
{
	const u64 pages[] = { 0, 1, 31, 32, 62, 63, 64, 65, 127, 128, TEST_NPAGES - 1 };
	u64 sum = guest_sweep(self->vcpu, &self->slot);
	int i;

	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		userfault_set_bit(&self->slot, pages[i]);
		userfault_on(&self->slot);

		guest_prepare(&self->slot, GUEST_SWEEP, 0, TEST_NPAGES);
		run_to_userfault(self->vcpu, &self->slot, pages[i]);
		userfault_publish(&self->slot, pages[i]);
		TEST_ASSERT_EQ(run_to_done(self->vcpu), sum);

		userfault_off(&self->slot);
	}
}

TEST_F(userfault, bits_beyond_the_slot_are_ignored)
{
	u64 i;

	for (i = TEST_NPAGES; i < self->slot.bitmap_size * 8; i++)
		userfault_set_bit(&self->slot, i);

	userfault_on(&self->slot);
	guest_sweep(self->vcpu, &self->slot);
}

TEST_F(userfault, bitmap_may_be_readonly_and_unpopulated)
{
	kvm_munmap(self->slot.bitmap, self->slot.bitmap_size);
	self->slot.bitmap = kvm_mmap(self->slot.bitmap_size, PROT_READ,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	userfault_on(&self->slot);
	guest_sweep(self->vcpu, &self->slot);
}

static void assert_unreadable_bitmap(struct kvm_vcpu *vcpu)
{
	int r = run_marked(vcpu);

	TEST_ASSERT(r == -1 && errno == EFAULT,
		    "KVM_RUN should fail with EFAULT, got %d errno %d", r, errno);
	TEST_ASSERT(vcpu->run->exit_reason != KVM_EXIT_MEMORY_FAULT,
		    "A bitmap that can't be read should not be reported as an exit, got gpa 0x%llx flags 0x%llx",
		    vcpu->run->memory_fault.gpa, vcpu->run->memory_fault.flags);
}

TEST_F(userfault, unreadable_bitmap)
{
	struct userfault_slot *slot = &self->slot;
	u64 exits = vcpu_get_stat(self->vcpu, userfault_exits);

	userfault_on(slot);
	mprotect(slot->bitmap, slot->bitmap_size, PROT_NONE);
	guest_prepare(slot, GUEST_READ, 1, 0);
	assert_unreadable_bitmap(self->vcpu);
	mprotect(slot->bitmap, slot->bitmap_size, PROT_READ | PROT_WRITE);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(1));

	kvm_munmap(slot->bitmap, slot->bitmap_size);
	guest_prepare(slot, GUEST_READ, 2, 0);
	assert_unreadable_bitmap(self->vcpu);
	assert_unreadable_bitmap(self->vcpu);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), exits);

	TEST_ASSERT(mmap(slot->bitmap, slot->bitmap_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == slot->bitmap,
		    "The bitmap's address should be free, errno %d", errno);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(2));
}

static int set_region(struct userfault_slot *slot, u32 flags, u64 bitmap)
{
	struct kvm_userspace_memory_region2 region =
		memslot2region(slot->vm, slot->id)->region;

	region.flags = flags;
	region.userfault_bitmap = bitmap;
	return __vm_ioctl(slot->vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

static void assert_set_region(struct userfault_slot *slot, const char *what,
			      u32 flags, u64 bitmap, int err)
{
	int r = set_region(slot, flags, bitmap);

	TEST_ASSERT(err ? r == -1 && errno == err : !r,
		    "%s: should get errno %d, got %d errno %d", what, err, r, errno);
}

#ifdef __aarch64__
/* Have the kernel take tagged addresses, as far as it does. */
static void permit_tagged_addresses(void)
{
	prctl(PR_SET_TAGGED_ADDR_CTRL, PR_TAGGED_ADDR_ENABLE, 0, 0, 0);
}
#else
static void permit_tagged_addresses(void) { }
#endif

#ifdef __x86_64__
#define USER_ADDRESS_BITS	63
#else
#define USER_ADDRESS_BITS	55
#endif

/*
 * Find where userspace ends for the kernel, which depends on page table levels
 * and on tagged addresses: mincore() of nothing checks the address only.
 */
static u64 user_address_end(void)
{
	u64 low = 0, high = BIT_ULL(USER_ADDRESS_BITS), middle;
	unsigned char vec;

	while (high - low > getpagesize()) {
		middle = align_down(low + (high - low) / 2, getpagesize());
		if (mincore((void *)middle, 0, &vec))
			high = middle;
		else
			low = middle;
	}

	return low;
}

TEST_F(userfault, is_reported_by_the_vm)
{
	TEST_ASSERT_EQ(vm_check_cap(self->vcpu->vm, KVM_CAP_USERFAULT), 1);
}

TEST_F(userfault, invalid_bitmap_pointer)
{
	const u64 bitmap = (u64)self->slot.bitmap;
	const u64 size = userfault_bitmap_bytes(TEST_NPAGES);
	const u64 end = user_address_end();
	const struct {
		const char *what;
		u64 bitmap;
		int err;
	} testcases[] = {
		{ "none",			0,		EINVAL },
		{ "misaligned by one",		bitmap + 1,	EINVAL },
		{ "misaligned by half a word",	bitmap + 4,	EINVAL },
		{ "misaligned by all but one",	bitmap + 7,	EINVAL },
		{ "the end of userspace",	end,		EINVAL },
		{ "kernel half",		BIT_ULL(63),	EINVAL },
		{ "last word",			-8ull,		EINVAL },
		{ "tagged",			bitmap | 0x2aull << 56,	EINVAL },
		{ "one word over the end",	end - size + 8,	EINVAL },
		{ "last word of userspace",	end - 8,	EINVAL },
		{ "up to the end",		end - size,	0 },
		{ "word-aligned",		bitmap + 8,	0 },
		{ "page-aligned",		bitmap,		0 },
	};
	int i;

	permit_tagged_addresses();
	for (i = 0; i < ARRAY_SIZE(testcases); i++) {
		assert_set_region(&self->slot, testcases[i].what, KVM_MEM_USERFAULT,
				  testcases[i].bitmap, testcases[i].err);
		assert_set_region(&self->slot, "off again", 0, 0, 0);
	}
}

TEST_F(userfault, invalid_pointer_at_creation)
{
	struct kvm_userspace_memory_region2 region =
		memslot2region(self->vm, USERFAULT_SLOT)->region;
	int r;

	region.slot = USERFAULT_SLOT + 1;
	region.guest_phys_addr += SZ_1G;
	region.flags = KVM_MEM_USERFAULT;
	region.userfault_bitmap = (u64)self->slot.bitmap + 1;
	r = __vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region);
	TEST_ASSERT(r == -1 && errno == EINVAL,
		    "A slot with a misaligned bitmap should be refused, got %d errno %d",
		    r, errno);

	region.userfault_bitmap--;
	vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region);

	region.memory_size = 0;
	vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

TEST_F(userfault, pointer_is_fixed_while_on)
{
	const u64 bitmap = (u64)self->slot.bitmap;
	struct userfault_slot *slot = &self->slot;

	assert_set_region(slot, "on", KVM_MEM_USERFAULT, bitmap, 0);
	assert_set_region(slot, "on, same region", KVM_MEM_USERFAULT, bitmap, 0);
	assert_set_region(slot, "on, other bitmap", KVM_MEM_USERFAULT, bitmap + 8, EINVAL);
	assert_set_region(slot, "on, no bitmap", KVM_MEM_USERFAULT, 0, EINVAL);
	assert_set_region(slot, "on, other bitmap and flags",
			  KVM_MEM_USERFAULT | KVM_MEM_LOG_DIRTY_PAGES, bitmap + 8, EINVAL);
	assert_set_region(slot, "on, other flags",
			  KVM_MEM_USERFAULT | KVM_MEM_LOG_DIRTY_PAGES, bitmap, 0);
	assert_set_region(slot, "off, other bitmap", 0, bitmap + 8, 0);
	assert_set_region(slot, "on, new bitmap", KVM_MEM_USERFAULT, bitmap + 8, 0);
	assert_set_region(slot, "on, old bitmap", KVM_MEM_USERFAULT, bitmap, EINVAL);
}

TEST_F(userfault, pointer_is_ignored_while_off)
{
	struct userfault_slot *slot = &self->slot;

	userfault_set_all(slot);
	assert_set_region(slot, "misaligned", 0, (u64)slot->bitmap + 1, 0);
	assert_set_region(slot, "kernel half", 0, BIT_ULL(63), 0);
	assert_set_region(slot, "valid", 0, (u64)slot->bitmap, 0);
	guest_sweep(self->vcpu, slot);
}

TEST_F(userfault, new_pointer_is_used)
{
	struct userfault_slot *slot = &self->slot;
	unsigned long *old = slot->bitmap;

	userfault_set_all(slot);
	userfault_on(slot);
	userfault_off(slot);

	slot->bitmap = kvm_mmap(slot->bitmap_size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1);
	userfault_set_bit(slot, 4);
	userfault_on(slot);
	kvm_munmap(old, slot->bitmap_size);

	guest_read_filled(self->vcpu, slot, 3);
	guest_read_faults(self->vcpu, slot, 4);
}

TEST_F(userfault, old_ioctl_refuses_the_flag)
{
	struct userfault_slot *slot = &self->slot;
	u64 size = TEST_NPAGES * slot->page_size;
	int r;

	r = __vm_set_user_memory_region(self->vm, slot->id, KVM_MEM_USERFAULT,
					slot->gpa, size, slot->mem);
	TEST_ASSERT(r == -1 && errno == EINVAL,
		    "KVM_SET_USER_MEMORY_REGION should refuse the flag, got %d errno %d",
		    r, errno);

	/* It can turn the flag off, though. */
	userfault_set_all(slot);
	userfault_on(slot);
	vm_set_user_memory_region(self->vm, slot->id, 0, slot->gpa, size, slot->mem);
	guest_sweep(self->vcpu, slot);
}

TEST_F(userfault, readonly_slot_can_toggle)
{
	struct userfault_slot *slot = &self->slot;

	vm_mem_region_delete(self->vm, slot->id);
	__userfault_slot_add(slot, self->vm, VM_MEM_SRC_ANONYMOUS, slot->gpa,
			     TEST_NPAGES, KVM_MEM_READONLY);

	userfault_set_all(slot);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 8);
	userfault_off(slot);
	userfault_fill(slot, 9);
	guest_read_filled(self->vcpu, slot, 9);
}

/* x86 looks at the bitmap before it finds out that it can't map the page. */
TEST_F(userfault, write_to_readonly_slot_is_mmio)
{
	struct userfault_slot *slot = &self->slot;

	vm_mem_region_delete(self->vm, slot->id);
	__userfault_slot_add(slot, self->vm, VM_MEM_SRC_ANONYMOUS, slot->gpa,
			     TEST_NPAGES, KVM_MEM_READONLY);
	userfault_fill_all(slot);
	userfault_set_all(slot);
	userfault_on(slot);

	guest_prepare(slot, GUEST_WRITE, 3, 0x99);
#ifdef __x86_64__
	run_to_userfault(self->vcpu, slot, 3);
	userfault_publish(slot, 3);
#endif
	TEST_ASSERT_EQ(run_marked(self->vcpu), 0);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT_EQ(self->vcpu->run->mmio.phys_addr, userfault_gpa(slot, 3));
	TEST_ASSERT(self->vcpu->run->mmio.is_write, "The access should be a write");

	/* The exit reason has to be left alone for KVM to complete the access. */
	vcpu_run(self->vcpu);
	TEST_ASSERT_EQ(get_ucall(self->vcpu, NULL), UCALL_SYNC);
	TEST_ASSERT_EQ(*userfault_page(slot, 3), userfault_pattern(3));
}

TEST_F(userfault, turning_on_zaps)
{
	struct userfault_slot *slot = &self->slot;

	guest_sweep(self->vcpu, slot);
	guest_access(self->vcpu, slot, GUEST_WRITE, 1, 1);
	userfault_set_all(slot);
	guest_read_filled(self->vcpu, slot, 0);

	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 0);
	guest_read_faults(self->vcpu, slot, 1);
}

TEST_F(userfault, setting_a_bit_does_not_unmap)
{
	struct userfault_slot *slot = &self->slot;

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 0);
	guest_access(self->vcpu, slot, GUEST_WRITE, 1, userfault_pattern(1));

	userfault_set_all(slot);
	guest_read_filled(self->vcpu, slot, 0);
	guest_read_filled(self->vcpu, slot, 1);
	guest_read_faults(self->vcpu, slot, 2);
}

#ifdef __x86_64__
/* With shadow paging, KVM walks the guest's page tables, and that does not exit. */
static bool guest_walks_page_tables(void)
{
	return kvm_is_tdp_enabled();
}

static gpa_t pte_gpa(struct kvm_vm *vm, gva_t gva)
{
	return addr_hva2gpa(vm, vm_get_pte(vm, gva));
}
#else
static bool guest_walks_page_tables(void)
{
	return true;
}

static gpa_t pte_gpa(struct kvm_vm *vm, gva_t gva)
{
	return addr_hva2gpa(vm, virt_get_pte_hva(vm, gva));
}
#endif

/* The guest's page tables are in slot 0, and one of their pages is trapped. */
TEST_F(userfault, page_table_walk_exits)
{
	struct userfault_slot tables, *slot = &self->slot;
	struct kvm_userspace_memory_region2 *region;
	u64 page;

	if (!guest_walks_page_tables())
		SKIP(return, "KVM walks the page tables of the guest");

	region = &memslot2region(self->vm, 0)->region;
	userfault_slot_init(&tables, self->vm, region->guest_phys_addr,
			    region->memory_size / getpagesize());
	tables.id = 0;
	page = (pte_gpa(self->vm, slot->gpa) - tables.gpa) / tables.page_size;
	userfault_set_bit(&tables, page);
	userfault_on(&tables);

	guest_prepare(slot, GUEST_READ, 3, 0);
	run_to_userfault(self->vcpu, &tables, page);
	run_to_userfault(self->vcpu, &tables, page);
	userfault_publish(&tables, page);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(3));
	userfault_off(&tables);
}

/* A page that the host takes away has to be mapped again, so that exits. */
TEST_F(userfault, unmapped_page_exits_again)
{
	struct userfault_slot *slot = &self->slot;

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 6);
	userfault_set_bit(slot, 6);
	kvm_madvise(userfault_page(slot, 6), slot->page_size, MADV_DONTNEED);
	guest_read_faults(self->vcpu, slot, 6);
}

/* The bitmap decides before anybody looks for the page. */
TEST_F(userfault, page_without_mapping_exits)
{
	struct userfault_slot *slot = &self->slot;
	void *page = userfault_page(slot, 6), *again;

	userfault_set_bit(slot, 6);
	userfault_on(slot);
	kvm_munmap(page, slot->page_size);
	guest_prepare(slot, GUEST_READ, 6, 0);
	run_to_userfault(self->vcpu, slot, 6);

	again = mmap(page, slot->page_size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	TEST_ASSERT(again == page, "mmap() should succeed, errno %d", errno);
	userfault_fill(slot, 6);
	userfault_publish(slot, 6);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(6));
}

TEST_F(userfault, slot_can_be_deleted_and_added_while_on)
{
	struct userfault_slot *slot = &self->slot;

	userfault_set_all(slot);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 0);
	vm_mem_region_delete(self->vm, slot->id);

	__userfault_slot_add(slot, self->vm, VM_MEM_SRC_ANONYMOUS, slot->gpa,
			     TEST_NPAGES, 0);
	userfault_fill_all(slot);
	guest_read_filled(self->vcpu, slot, 1);
	userfault_set_bit(slot, 1);
	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 0);
	guest_read_faults(self->vcpu, slot, 1);
}

/* The bitmap belongs to the slot, not to where the slot is. */
TEST_F(userfault, slot_can_move_while_on)
{
	struct userfault_slot *slot = &self->slot;

	userfault_set_bit(slot, 4);
	userfault_set_bit(slot, 5);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 4);

	slot->gpa += SZ_1G;
	vm_mem_region_move(self->vm, slot->id, slot->gpa);
	userfault_slot_map(slot);
	guest_read_filled(self->vcpu, slot, 4);
	guest_read_faults(self->vcpu, slot, 5);
	userfault_off(slot);
	guest_sweep(self->vcpu, slot);
}

TEST_F(userfault, exits_are_counted)
{
	struct userfault_slot *slot = &self->slot;
	u64 exits = vcpu_get_stat(self->vcpu, userfault_exits);
	u64 i;

	userfault_set_all(slot);
	userfault_on(slot);
	for (i = 0; i < 10; i++)
		guest_read_faults(self->vcpu, slot, i);
	for (i = 0; i < 10; i++)
		guest_read_filled(self->vcpu, slot, i);

	guest_prepare(slot, GUEST_READ, 20, 0);
	run_to_userfault(self->vcpu, slot, 20);
	run_to_userfault(self->vcpu, slot, 20);

	exits = vcpu_get_stat(self->vcpu, userfault_exits) - exits;
	TEST_ASSERT(exits == 12, "Should count 12 exits, got %lu", exits);
}

static bool write_file(const char *path, const char *s)
{
	int fd = open(path, O_WRONLY | O_TRUNC);
	bool ok = fd >= 0 && write(fd, s, strlen(s)) == strlen(s);

	if (fd >= 0)
		close(fd);
	return ok;
}

static int count_in_trace(const char *needle)
{
	FILE *f = fopen(TRACE "trace", "r");
	char line[512];
	int n = 0;

	TEST_ASSERT(f, "The trace should be readable, errno %d", errno);
	while (fgets(line, sizeof(line), f))
		n += strstr(line, needle) && line[0] != '#';
	fclose(f);
	return n;
}

TEST_F(userfault, tracepoint_fires)
{
	struct userfault_slot *slot = &self->slot;
	char event[64], pid[16];
	int n, i;

	if (access(TRACEFS "trace", R_OK))
		mount("tracefs", TRACEFS, "tracefs", 0, NULL);
	if (access(TRACEFS "trace", R_OK))
		SKIP(return, "no tracefs at " TRACEFS);

	rmdir(TRACE);
	TEST_ASSERT_EQ(mkdir(TRACE, 0700), 0);
	snprintf(pid, sizeof(pid), "%d", getpid());
	TEST_ASSERT(write_file(TRACE "set_event_pid", pid) &&
		    write_file(TRACE "events/kvm/kvm_userfault/enable", "1"),
		    "The event should be there, and of this process only, errno %d", errno);

	userfault_set_all(slot);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 0);
	guest_read_faults(self->vcpu, slot, 1);

	n = count_in_trace("kvm_userfault:");
	TEST_ASSERT(n == 2, "The tracepoint should fire twice, got %d", n);
	for (i = 0; i < 2; i++) {
		snprintf(event, sizeof(event), "kvm_userfault: vcpu 0 gpa 0x%lx shared",
			 userfault_gpa(slot, i));
		TEST_ASSERT_EQ(count_in_trace(event), 1);
	}
	TEST_ASSERT_EQ(rmdir(TRACE), 0);
}

/* Whether the kernel has warned since boot: it may do so only once per place. */
static bool kernel_has_warned(void)
{
	FILE *f = fopen("/proc/sys/kernel/tainted", "r");
	unsigned long taint = 0;

	if (!f)
		return false;
	TEST_ASSERT(fscanf(f, "%lu", &taint) == 1, "Taint should be a number");
	fclose(f);
	return taint & BIT(9);
}

static void assert_dirty(struct userfault_slot *slot, u64 page)
{
	unsigned long log[DIV_ROUND_UP(TEST_NPAGES, BITS_PER_BITMAP_WORD)] = { };
	u64 i;

	kvm_vm_get_dirty_log(slot->vm, slot->id, log);
	for (i = 0; i < slot->npages; i++) {
		bool dirty = log[i / BITS_PER_BITMAP_WORD] &
			     1UL << (i % BITS_PER_BITMAP_WORD);

		TEST_ASSERT(dirty == (i == page), "Page %lu should be %s after a write to page %lu",
			    i, i == page ? "dirty" : "clean", page);
	}
}

TEST_F(userfault, dirty_logging_together)
{
	struct userfault_slot *slot = &self->slot;
	bool warned = kernel_has_warned();

	userfault_set_all(slot);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 4);

	slot->base_flags = KVM_MEM_LOG_DIRTY_PAGES;
	userfault_on(slot);
	guest_access(self->vcpu, slot, GUEST_WRITE, 4, 1);
	assert_dirty(slot, 4);

	guest_prepare(slot, GUEST_WRITE, 70, 1);
	run_to_userfault(self->vcpu, slot, 70);
	userfault_publish(slot, 70);
	run_to_done(self->vcpu);
	assert_dirty(slot, 70);

	userfault_off(slot);
	guest_access(self->vcpu, slot, GUEST_WRITE, TEST_NPAGES - 1, 1);
	assert_dirty(slot, TEST_NPAGES - 1);
	guest_read_filled(self->vcpu, slot, 71);

	userfault_on(slot);
	slot->base_flags = 0;
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 72);
	userfault_off(slot);

	TEST_ASSERT(warned || !kernel_has_warned(),
		    "The kernel should not warn, look at its log");
}

TEST_F(userfault, pre_fault_stops_at_a_set_bit)
{
	struct userfault_slot *slot = &self->slot;
	struct kvm_pre_fault_memory range = {
		.gpa = userfault_gpa(slot, 0),
		.size = 4 * slot->page_size,
	};
	int r;

	if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_CAP_PRE_FAULT_MEMORY");

	userfault_set_bit(slot, 2);
	userfault_on(slot);

	/* What was done before the fault counts first, as with any other error. */
	do {
		r = __vcpu_ioctl(self->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while ((!r && range.size) || (r && errno == EINTR));
	TEST_ASSERT(r == -1 && errno == EFAULT,
		    "Pre-faulting a set bit should fail with EFAULT, got %d errno %d", r, errno);
	TEST_ASSERT(range.gpa == userfault_gpa(slot, 2),
		    "Pre-faulting should stop at gpa 0x%lx, got 0x%llx",
		    userfault_gpa(slot, 2), range.gpa);

	userfault_publish(slot, 2);
	vcpu_ioctl(self->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	TEST_ASSERT(!range.size, "Should pre-fault all, 0x%llx left", range.size);

	userfault_set_bit(slot, 2);
	guest_read_filled(self->vcpu, slot, 2);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
