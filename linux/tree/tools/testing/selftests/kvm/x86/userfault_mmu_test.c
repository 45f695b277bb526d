// SPDX-License-Identifier: GPL-2.0
/*
 * Test KVM Userfault with what only x86 has: the size of mappings in statistics,
 * private memory, the address space of SMM, and nested guests.
 */
#include <linux/falloc.h>

#include "kvm_userfault_util.h"
#include "processor.h"
#include "smm.h"
#include "svm_util.h"
#include "vmx.h"

#include "kvm_test_harness.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

#define PAGES_PER_2M	(SZ_2M / PAGE_SIZE)
#define TEST_PORT	0xe

/* One huge page of memory, mapped as one by the guest, too. */
FIXTURE(huge) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
};

FIXTURE_VARIANT(huge) {
	enum vm_mem_backing_src_type src_type;
};

FIXTURE_VARIANT_ADD(huge, thp) {
	.src_type = VM_MEM_SRC_ANONYMOUS_THP,
};

FIXTURE_VARIANT_ADD(huge, hugetlb) {
	.src_type = VM_MEM_SRC_SHARED_HUGETLB,
};

static bool have_2m_hugetlb(void)
{
	return get_def_hugetlb_pagesz() == SZ_2M && have_hugetlb(SZ_2M);
}

FIXTURE_SETUP(huge)
{
	struct userfault_slot *slot = &self->slot;
	bool thp = variant->src_type == VM_MEM_SRC_ANONYMOUS_THP;

	if (thp && !thp_configured())
		SKIP(return, "no transparent huge pages");
	if (!thp && !have_2m_hugetlb())
		SKIP(return, "no free 2 MiB huge page");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code);
	__userfault_slot_add(slot, self->vm, variant->src_type, USERFAULT_GPA,
			     PAGES_PER_2M, 0);
	virt_map_level(self->vm, slot->gpa, slot->gpa, SZ_2M, PG_LEVEL_2M);
	userfault_fill_all(slot);
	if (thp && madvise(slot->mem, SZ_2M, MADV_COLLAPSE))
		SKIP(return, "no huge page to be had, errno %d", errno);
}

FIXTURE_TEARDOWN(huge)
{
	kvm_vm_free(self->vm);
}

struct page_stats {
	u64 pages_4k;
	u64 pages_2m;
};

static struct page_stats get_page_stats(struct kvm_vm *vm)
{
	return (struct page_stats) {
		.pages_4k = vm_get_stat(vm, pages_4k),
		.pages_2m = vm_get_stat(vm, pages_2m),
	};
}

static void sweep(struct kvm_vcpu *vcpu, struct userfault_slot *slot)
{
	guest_access(vcpu, slot, GUEST_SWEEP, 0, slot->npages);
}

static void assert_small(struct kvm_vm *vm, struct page_stats *base, const char *when)
{
	struct page_stats stats = get_page_stats(vm);

	TEST_ASSERT(stats.pages_2m == 0, "%s: should have no 2M mapping, got %lu",
		    when, stats.pages_2m);
	TEST_ASSERT(stats.pages_4k >= base->pages_4k + PAGES_PER_2M,
		    "%s: should have %lu 4K mappings more than %lu, got %lu", when,
		    (u64)PAGES_PER_2M, base->pages_4k, stats.pages_4k);
}

static void assert_huge(struct kvm_vm *vm, struct page_stats *base, const char *when)
{
	struct page_stats stats = get_page_stats(vm);

	TEST_ASSERT(stats.pages_2m == 1, "%s: should have one 2M mapping, got %lu",
		    when, stats.pages_2m);
	TEST_ASSERT(stats.pages_4k < base->pages_4k + PAGES_PER_2M,
		    "%s: should not have %lu 4K mappings more than %lu, got %lu", when,
		    (u64)PAGES_PER_2M, base->pages_4k, stats.pages_4k);
}

TEST_F(huge, small_while_on_huge_after_off)
{
	struct userfault_slot *slot = &self->slot;
	struct page_stats base;

	/* Have the guest's own pages mapped before counting. */
	guest_access(self->vcpu, slot, GUEST_SWEEP, 0, 0);
	base = get_page_stats(self->vm);

	sweep(self->vcpu, slot);
	assert_huge(self->vm, &base, "before");

	userfault_on(slot);
	TEST_ASSERT_EQ(get_page_stats(self->vm).pages_2m, 0);
	sweep(self->vcpu, slot);
	assert_small(self->vm, &base, "while on");

	userfault_off(slot);
	sweep(self->vcpu, slot);
	assert_huge(self->vm, &base, "after off");
}

TEST_F(huge, small_until_both_are_off)
{
	struct userfault_slot *slot = &self->slot;
	struct page_stats base;

	guest_access(self->vcpu, slot, GUEST_SWEEP, 0, 0);
	base = get_page_stats(self->vm);

	userfault_on(slot);
	sweep(self->vcpu, slot);
	slot->base_flags = KVM_MEM_LOG_DIRTY_PAGES;
	userfault_on(slot);
	sweep(self->vcpu, slot);
	assert_small(self->vm, &base, "both on");

	userfault_off(slot);
	sweep(self->vcpu, slot);
	assert_small(self->vm, &base, "dirty logging");

	userfault_on(slot);
	sweep(self->vcpu, slot);
	slot->base_flags = 0;
	userfault_on(slot);
	sweep(self->vcpu, slot);
	assert_small(self->vm, &base, "userfault");

	userfault_off(slot);
	sweep(self->vcpu, slot);
	assert_huge(self->vm, &base, "both off");
}

/* One set bit in a huge page stands for its 4 KiB only. */
TEST_F(huge, one_page_exits)
{
	userfault_set_bit(&self->slot, 300);
	userfault_on(&self->slot);

	guest_prepare(&self->slot, GUEST_SWEEP, 0, PAGES_PER_2M);
	run_to_userfault(self->vcpu, &self->slot, 300);
	userfault_publish(&self->slot, 300);
	run_to_done(self->vcpu);
}

static void guest_outs(void)
{
	for (;;)
		asm volatile("outsb" : : "S"(USERFAULT_GPA), "d"(TEST_PORT) : "memory");
}

/* Userfault is for vCPUs: what KVM reads for itself, it reads through the host. */
TEST(own_accesses_do_not_exit)
{
	struct userfault_slot slot;
	struct kvm_vcpu *vcpu;
	struct kvm_run *run;
	struct kvm_vm *vm;
	u8 *data;

	vm = vm_create_with_one_vcpu(&vcpu, guest_outs);
	userfault_slot_add(&slot, vm, VM_MEM_SRC_ANONYMOUS, USERFAULT_GPA, 1);
	slot.mem[0] = 0xa7;
	userfault_set_all(&slot);
	userfault_on(&slot);

	TEST_ASSERT_EQ(run_marked(vcpu), 0);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	run = vcpu->run;
	data = (u8 *)run + run->io.data_offset;
	TEST_ASSERT(run->io.port == TEST_PORT && *data == 0xa7,
		    "The guest should output 0xa7 to port 0x%x, got 0x%x to 0x%x",
		    TEST_PORT, *data, run->io.port);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_exits), 0);
	kvm_vm_free(vm);
}

#define PRIVATE_NPAGES		8
#define PRIVATE_USERFAULT	(KVM_MEMORY_EXIT_FLAG_USERFAULT | \
				 KVM_MEMORY_EXIT_FLAG_PRIVATE)

/* One vCPU, and a slot whose pages can be private; all are shared at first. */
FIXTURE(private) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
};

FIXTURE_SETUP(private)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no software-protected VMs");

	self->vm = vm_create_shape_with_one_vcpu(shape, &self->vcpu, userfault_guest_code);
	__userfault_slot_add(&self->slot, self->vm, VM_MEM_SRC_ANONYMOUS, USERFAULT_GPA,
			     PRIVATE_NPAGES, KVM_MEM_GUEST_MEMFD);
	userfault_slot_map(&self->slot);
}

FIXTURE_TEARDOWN(private)
{
	kvm_vm_free(self->vm);
}

TEST_F(private, accesses_exit)
{
	vm_mem_set_private(self->vm, self->slot.gpa, PRIVATE_NPAGES / 2 * PAGE_SIZE);
	userfault_set_all(&self->slot);
	userfault_on(&self->slot);

	guest_prepare(&self->slot, GUEST_WRITE, 0, 0x77);
	run_to_fault(self->vcpu, &self->slot, 0, PRIVATE_USERFAULT);
	userfault_publish(&self->slot, 0);
	run_to_done(self->vcpu);

	guest_prepare(&self->slot, GUEST_READ, 1, 0);
	run_to_fault(self->vcpu, &self->slot, 1, PRIVATE_USERFAULT);
	userfault_publish(&self->slot, 1);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0);

	/* A page of the same slot that is shared comes from the other mapping. */
	guest_read_faults(self->vcpu, &self->slot, PRIVATE_NPAGES / 2);

	/* What is in private memory outlives toggling, and bits set again. */
	userfault_off(&self->slot);
	TEST_ASSERT_EQ(guest_access(self->vcpu, &self->slot, GUEST_READ, 0, 0), 0x77);
	guest_access(self->vcpu, &self->slot, GUEST_WRITE, 2, 0x78);
	userfault_set_all(&self->slot);
	userfault_on(&self->slot);
	guest_prepare(&self->slot, GUEST_READ, 2, 0);
	run_to_fault(self->vcpu, &self->slot, 2, PRIVATE_USERFAULT);
	userfault_publish(&self->slot, 2);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0x78);

	vm_guest_mem_punch_hole(self->vm, userfault_gpa(&self->slot, 2), PAGE_SIZE);
	TEST_ASSERT_EQ(guest_access(self->vcpu, &self->slot, GUEST_READ, 2, 0), 0);
}

/* What is private and what is not is looked up before the bitmap is. */
TEST_F(private, conversions_exit_as_what_the_page_is)
{
	int i;

	userfault_on(&self->slot);

	for (i = 0; i < 4; i++) {
		userfault_set_bit(&self->slot, 1);
		vm_mem_set_private(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
		guest_prepare(&self->slot, GUEST_WRITE, 1, 0x50 + i);
		run_to_fault(self->vcpu, &self->slot, 1, PRIVATE_USERFAULT);

		/* The page is converted while its exit is outstanding, and back. */
		vm_mem_set_shared(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
		run_to_userfault(self->vcpu, &self->slot, 1);
		vm_mem_set_private(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
		run_to_fault(self->vcpu, &self->slot, 1, PRIVATE_USERFAULT);
		userfault_publish(&self->slot, 1);
		run_to_done(self->vcpu);

		/* A conversion unmaps the page, so a bit that is set counts again. */
		userfault_set_bit(&self->slot, 1);
		vm_mem_set_shared(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
		guest_read_faults(self->vcpu, &self->slot, 1);
		vm_mem_set_private(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
		TEST_ASSERT_EQ(guest_access(self->vcpu, &self->slot, GUEST_READ, 1, 0), 0x50 + i);
		vm_mem_set_shared(self->vm, userfault_gpa(&self->slot, 1), PAGE_SIZE);
	}
}

#define SMM_GPA		0xc0000000ull
#define SMM_CODE_PAGE	(0x8000 / PAGE_SIZE)
#define SMM_SLOT	(BIT(16) | USERFAULT_SLOT)

/* A slot in SMM's address space, at the same GPAs as @slot, and with all bits set. */
static void smm_slot_add(struct userfault_slot *smm, struct userfault_slot *slot)
{
	static const u8 smi_handler[] = {
		0xe4, TEST_PORT,	/* in $TEST_PORT, %al */
		0x0f, 0xaa,		/* rsm */
	};
	struct kvm_userspace_memory_region2 region = {
		.slot = SMM_SLOT,
		.flags = KVM_MEM_USERFAULT,
		.guest_phys_addr = slot->gpa,
		.memory_size = slot->npages * PAGE_SIZE,
	};

	userfault_slot_init(smm, slot->vm, slot->gpa, slot->npages);
	smm->mem = kvm_mmap(region.memory_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1);
	memcpy(userfault_page(smm, SMM_CODE_PAGE), smi_handler, sizeof(smi_handler));
	userfault_set_all(smm);

	region.userspace_addr = (u64)smm->mem;
	region.userfault_bitmap = (u64)smm->bitmap;
	vm_ioctl(slot->vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

TEST(smm_has_its_own_bitmap)
{
	struct userfault_slot slot, smm;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;

	if (!kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "no SMM");

	vm = vm_create_with_one_vcpu(&vcpu, userfault_guest_code);
	userfault_slot_add(&slot, vm, VM_MEM_SRC_ANONYMOUS, SMM_GPA, SMRAM_PAGES);
	userfault_fill_all(&slot);
	userfault_set_bit(&slot, 0);
	userfault_on(&slot);
	smm_slot_add(&smm, &slot);
	vcpu_set_msr(vcpu, MSR_IA32_SMBASE, SMM_GPA);

	/* Outside of SMM, only page 0 exits. */
	guest_read_filled(vcpu, &slot, SMM_CODE_PAGE);
	guest_read_faults(vcpu, &slot, 0);

	/* Inside, the page with the handler does, until its own bit is clear. */
	guest_prepare(&slot, GUEST_READ, 1, 0);
	inject_smi(vcpu);
	run_to_userfault(vcpu, &smm, SMM_CODE_PAGE);
	userfault_publish(&slot, SMM_CODE_PAGE);
	run_to_userfault(vcpu, &smm, SMM_CODE_PAGE);
	userfault_publish(&smm, SMM_CODE_PAGE);

	TEST_ASSERT_EQ(run_marked(vcpu), 0);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(vcpu->run->io.port, TEST_PORT);

	/* And outside again, it does not matter what SMM's bitmap says. */
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(1));
	kvm_vm_free(vm);
}

/*
 * L2 uses the first two pages of the slot through two others if it has page
 * tables of its own, so that its GPAs differ from the ones of L1.
 */
#define NESTED_GPA	0xc0000000ull
#define NESTED_NPAGES	4

static u64 l2_base;

static void l2_guest_code(void)
{
	GUEST_SYNC(READ_ONCE(*(u64 *)l2_base));
	WRITE_ONCE(*(u64 *)(l2_base + PAGE_SIZE), 0x1122);
	GUEST_SYNC(0);
	GUEST_SYNC(READ_ONCE(*(u64 *)l2_base));
	vmcall();
}

static void l1_vmx_code(struct vmx_pages *vmx)
{
	GUEST_ASSERT(vmx->vmcs_gpa);
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_guest_code);
	GUEST_ASSERT(!vmlaunch());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
}

static void l1_svm_code(struct svm_test_data *svm)
{
	generic_svm_setup(svm, l2_guest_code);
	run_guest(svm->vmcb, svm->vmcb_gpa);
	GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
}

static void l1_guest_code(void *data)
{
	if (this_cpu_has(X86_FEATURE_VMX))
		l1_vmx_code(data);
	else
		l1_svm_code(data);
	GUEST_DONE();
}

static struct kvm_vm *create_nested_vm(struct kvm_vcpu **vcpu, bool tdp,
				       struct userfault_slot *slot)
{
	struct kvm_vm *vm = vm_create_with_one_vcpu(vcpu, l1_guest_code);
	gva_t nested_gva;

	if (tdp)
		vm_enable_tdp(vm);
	if (kvm_cpu_has(X86_FEATURE_VMX))
		vcpu_alloc_vmx(vm, &nested_gva);
	else
		vcpu_alloc_svm(vm, &nested_gva);
	vcpu_args_set(*vcpu, 1, nested_gva);

	userfault_slot_add(slot, vm, VM_MEM_SRC_ANONYMOUS, NESTED_GPA, NESTED_NPAGES);
	if (tdp) {
		tdp_identity_map_default_memslots(vm);
		tdp_map(vm, userfault_gpa(slot, 2), userfault_gpa(slot, 0), 2 * PAGE_SIZE);
	}
	write_guest_global(vm, l2_base, userfault_gpa(slot, tdp ? 2 : 0));
	return vm;
}

static void test_nested(bool tdp)
{
	struct userfault_slot slot;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;

	vm = create_nested_vm(&vcpu, tdp, &slot);
	userfault_set_all(&slot);
	userfault_on(&slot);

	run_to_userfault(vcpu, &slot, 0);
	run_to_userfault(vcpu, &slot, 0);
	userfault_fill(&slot, 0);
	userfault_publish(&slot, 0);
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(0));

	run_to_userfault(vcpu, &slot, 1);
	userfault_publish(&slot, 1);
	run_to_done(vcpu);
	TEST_ASSERT_EQ(*userfault_page(&slot, 1), 0x1122);

	/* Turning it on zaps what L2 has mapped. */
	userfault_off(&slot);
	userfault_set_all(&slot);
	userfault_on(&slot);
	run_to_userfault(vcpu, &slot, 0);
	userfault_publish(&slot, 0);
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(0));

	run_to_the_end(vcpu);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_exits), 4);
	kvm_vm_free(vm);
}

TEST(nested_exits_with_the_gpa_of_l1)
{
	if (!kvm_cpu_has(X86_FEATURE_VMX) && !kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "no nested virtualization");
	test_nested(false);
}

TEST(nested_tdp_exits_with_the_gpa_of_l1)
{
	if (!kvm_cpu_has(X86_FEATURE_VMX) && !kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "no nested virtualization");
	if (!kvm_cpu_has_tdp())
		SKIP(return, "no nested paging in nested guests");
	test_nested(true);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
