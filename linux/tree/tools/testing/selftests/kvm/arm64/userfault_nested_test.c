// SPDX-License-Identifier: GPL-2.0
/*
 * Test KVM Userfault with nested virtualization on arm64: the addresses of a
 * nested guest, and the page that VNCR_EL2 points to.
 */
#include <asm/ptrace.h>
#include <asm/sysreg.h>
#include <linux/bitfield.h>

#include "kvm_userfault_util.h"
#include "processor.h"

#include "kvm_test_harness.h"

/* A nested guest finds pages 0 and 1 of the slot at the addresses of 2 and 3. */
#define NESTED_NPAGES		5
#define NESTED_VNCR_PAGE	4

/* Stage 2 of the nested guest: 39 bits, i.e. three levels of 4KiB tables. */
#define S2_VTCR		(FIELD_PREP(VTCR_EL2_T0SZ_MASK, 25) |		\
			 FIELD_PREP(VTCR_EL2_SL0_MASK, 1) |		\
			 FIELD_PREP(VTCR_EL2_IRGN0_MASK, 1) |		\
			 FIELD_PREP(VTCR_EL2_ORGN0_MASK, 1) |		\
			 FIELD_PREP(VTCR_EL2_SH0_MASK, 3) |		\
			 FIELD_PREP(VTCR_EL2_PS_MASK, 2))
/* Inner shareable normal memory, readable and writable, accessed before */
#define S2_ATTRS		(FIELD_PREP(GENMASK(5, 2), 0xf) |	\
				 FIELD_PREP(GENMASK(7, 6), 3) |		\
				 FIELD_PREP(GENMASK(9, 8), 3) |		\
				 BIT(10))
#define S2_BLOCK		(S2_ATTRS | 1)
#define S2_PAGE			(S2_ATTRS | 3)
#define S2_TABLE		3
#define S2_ENTRIES		512

/* Where VTTBR_EL2 is in the page that VNCR_EL2 points to */
#define VNCR_VTTBR_EL2		0x20

/* What the guest has to know; addresses, and no VNCR page if it is 0. */
static struct {
	u64 s2_table;
	u64 stack_top;
	u64 base;
	u64 vncr;
} params;

static void nested_guest_code(void)
{
	GUEST_SYNC(READ_ONCE(*(u64 *)params.base));
	WRITE_ONCE(*(u64 *)(params.base + SZ_4K), 0x1122);
	GUEST_SYNC(0);
	GUEST_SYNC(READ_ONCE(*(u64 *)params.base));

	/* As its hypervisor has set NV2, this is a load from the VNCR page. */
	if (params.vncr)
		GUEST_SYNC(read_sysreg_s(SYS_VTTBR_EL2));
	GUEST_DONE();
}

#define copy_el2_to_el1(reg)						\
	write_sysreg_s(read_sysreg_s(SYS_##reg##_EL1), SYS_##reg##_EL12)

/* At EL2: run nested_guest_code() at EL1, with the same stage 1 as here. */
static void hypervisor_code(void)
{
	u64 nv = params.vncr ? HCR_EL2_NV | HCR_EL2_NV2 : 0;

	GUEST_ASSERT_EQ(get_current_el(), 2);

	copy_el2_to_el1(SCTLR);
	copy_el2_to_el1(MAIR);
	copy_el2_to_el1(TCR);
	copy_el2_to_el1(TTBR0);
	copy_el2_to_el1(TTBR1);
	copy_el2_to_el1(CPACR);

	if (params.vncr)
		write_sysreg_s(params.vncr, SYS_VNCR_EL2);
	write_sysreg(S2_VTCR, vtcr_el2);
	write_sysreg(params.s2_table | 1ull << 48, vttbr_el2);
	sysreg_clear_set(hcr_el2, HCR_EL2_TGE, HCR_EL2_VM | nv);
	isb();
	asm volatile("tlbi vmalls12e1is\n"
		     "dsb ish\n"
		     "isb" : : : "memory");

	write_sysreg(params.stack_top, sp_el1);
	write_sysreg((u64)nested_guest_code, elr_el2);
	write_sysreg(PSR_MODE_EL1h | PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT,
		     spsr_el2);
	asm volatile("eret" : : : "memory");
}

FIXTURE(nested) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
};

static u64 *alloc_table(struct kvm_vm *vm, gpa_t *gpa)
{
	gva_t gva = vm_alloc_page(vm);

	*gpa = addr_gva2gpa(vm, gva);
	return addr_gva2hva(vm, gva);
}

/* Map all to itself, but the two pages that the nested guest has elsewhere. */
static gpa_t build_stage2(struct kvm_vm *vm, struct userfault_slot *slot)
{
	gpa_t gpa1, gpa2, gpa3;
	u64 *table1 = alloc_table(vm, &gpa1);
	u64 *table2 = alloc_table(vm, &gpa2);
	u64 *table3 = alloc_table(vm, &gpa3);
	u64 i;

	for (i = 0; i < S2_ENTRIES; i++) {
		table1[i] = i * SZ_1G | S2_BLOCK;
		table2[i] = (slot->gpa + i * SZ_2M) | S2_BLOCK;
		table3[i] = (slot->gpa + i * SZ_4K) | S2_PAGE;
	}
	table1[slot->gpa / SZ_1G] = gpa2 | S2_TABLE;
	table2[0] = gpa3 | S2_TABLE;
	table3[2] = userfault_gpa(slot, 0) | S2_PAGE;
	table3[3] = userfault_gpa(slot, 1) | S2_PAGE;
	return gpa1;
}

FIXTURE_SETUP(nested)
{
	struct userfault_slot *slot = &self->slot;
	gva_t stack;

	if (getpagesize() != SZ_4K)
		SKIP(return, "stage 2 of the nested guest has pages of 4 KiB");
	if (!test_supports_el2())
		SKIP(return, "no EL2 in guests (kvm-arm.mode=nested)");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, hypervisor_code);
	userfault_slot_add(slot, self->vm, VM_MEM_SRC_ANONYMOUS, USERFAULT_GPA,
			   NESTED_NPAGES);
	stack = vm_alloc_page(self->vm);
	params.s2_table = build_stage2(self->vm, slot);
	params.stack_top = stack + SZ_4K;
	params.base = userfault_gpa(slot, 2);
	sync_global_to_guest(self->vm, params);
	userfault_set_all(slot);
	userfault_on(slot);
}

FIXTURE_TEARDOWN(nested)
{
	kvm_vm_free(self->vm);
}

/* The part that both tests share: what the nested guest reads and writes. */
static void run_accesses(struct kvm_vcpu *vcpu, struct userfault_slot *slot)
{
	run_to_userfault(vcpu, slot, 0);
	run_to_userfault(vcpu, slot, 0);
	userfault_fill(slot, 0);
	userfault_publish(slot, 0);
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(0));

	run_to_userfault(vcpu, slot, 1);
	userfault_publish(slot, 1);
	run_to_done(vcpu);
	TEST_ASSERT_EQ(*userfault_page(slot, 1), 0x1122);

	/* Turning it on unmaps what the nested guest has mapped. */
	userfault_off(slot);
	userfault_set_all(slot);
	userfault_on(slot);
	run_to_userfault(vcpu, slot, 0);
	userfault_publish(slot, 0);
	TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(0));
}

TEST_F(nested, exits_with_the_address_of_its_parent)
{
	run_accesses(self->vcpu, &self->slot);
	run_to_the_end(self->vcpu);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), 4);
}

/* The registers of a nested hypervisor are memory, too. */
TEST_F(nested, vncr_page_exits)
{
	struct userfault_slot *slot = &self->slot;
	u64 *page = userfault_page(slot, NESTED_VNCR_PAGE);

	params.vncr = userfault_gpa(slot, NESTED_VNCR_PAGE);
	sync_global_to_guest(self->vm, params);

	run_accesses(self->vcpu, slot);
	run_to_userfault(self->vcpu, slot, NESTED_VNCR_PAGE);
	run_to_userfault(self->vcpu, slot, NESTED_VNCR_PAGE);
	page[VNCR_VTTBR_EL2 / sizeof(u64)] = 0x3344;
	userfault_publish(slot, NESTED_VNCR_PAGE);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0x3344);
	run_to_the_end(self->vcpu);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
