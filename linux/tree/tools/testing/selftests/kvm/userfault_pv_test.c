// SPDX-License-Identifier: GPL-2.0
/*
 * Test what KVM Userfault leaves to userfaultfd: KVM's own accesses to the
 * guest's memory, here those of paravirtual clocks and of stolen time.
 */
#include <linux/userfaultfd.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>
#include <asm/pvclock-abi.h>
#endif

#include "kvm_userfault_util.h"
#include "processor.h"
#include "userfaultfd_util.h"

#include "kvm_test_harness.h"

#define TEST_NPAGES	4
#define PV_PAGE		2

static u8 *page_contents;
static int nr_uffd_faults;

static int provide_page(int mode, int uffd, struct uffd_msg *msg)
{
	struct uffdio_copy copy = {
		.src = (u64)page_contents,
		.dst = align_down(msg->arg.pagefault.address, getpagesize()),
		.len = getpagesize(),
	};

	nr_uffd_faults++;
	return ioctl(uffd, UFFDIO_COPY, &copy);
}

/* One vCPU, and memory that is trapped for it and for KVM, with nothing there. */
FIXTURE(pv) {
	struct kvm_vcpu *vcpu;
	struct userfault_slot slot;
	struct uffd_desc *uffd;
};

FIXTURE_SETUP(pv)
{
	struct userfault_slot *slot = &self->slot;

	userfault_slot_add(slot, vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code),
			   VM_MEM_SRC_ANONYMOUS, USERFAULT_GPA, TEST_NPAGES);
	page_contents = kvm_mmap(getpagesize(), PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1);
	self->uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, slot->mem,
					      TEST_NPAGES * slot->page_size, 1,
					      provide_page);
	userfault_set_all(slot);
	userfault_on(slot);
}

FIXTURE_TEARDOWN(pv)
{
	uffd_stop_demand_paging(self->uffd);
	kvm_vm_free(self->vcpu->vm);
}

/* KVM came for the page by itself, and nobody left the guest because of that. */
static void assert_only_kvm_accessed(struct kvm_vcpu *vcpu)
{
	TEST_ASSERT(nr_uffd_faults == 1, "KVM's access should be one fault in userfaultfd, got %d",
		    nr_uffd_faults);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_exits), 0);
}

/* The same page is still trapped for the guest, which then sees what KVM wrote. */
static u64 read_after_kvm(struct kvm_vcpu *vcpu, struct userfault_slot *slot)
{
	guest_prepare(slot, GUEST_READ, PV_PAGE, 0);
	run_to_userfault(vcpu, slot, PV_PAGE);
	userfault_publish(slot, PV_PAGE);
	return run_to_done(vcpu);
}

#ifdef __x86_64__

TEST_F(pv, kvmclock_does_not_exit)
{
	struct userfault_slot *slot = &self->slot;
	struct pvclock_vcpu_time_info *time = (void *)userfault_page(slot, PV_PAGE);

	vcpu_set_msr(self->vcpu, MSR_KVM_SYSTEM_TIME_NEW,
		     userfault_gpa(slot, PV_PAGE) | KVM_MSR_ENABLED);
	guest_access(self->vcpu, slot, GUEST_SWEEP, 0, 0);
	assert_only_kvm_accessed(self->vcpu);
	TEST_ASSERT(time->version && !(time->version & 1),
		    "The clock should be valid, got version %u", time->version);
	TEST_ASSERT((u32)read_after_kvm(self->vcpu, slot) >= time->version,
		    "The guest should see the clock, too");
}

TEST_F(pv, steal_time_does_not_exit)
{
	struct userfault_slot *slot = &self->slot;
	struct kvm_steal_time *steal = (void *)userfault_page(slot, PV_PAGE);

	if (!kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME))
		SKIP(return, "no steal time");

	vcpu_set_msr(self->vcpu, MSR_KVM_STEAL_TIME,
		     userfault_gpa(slot, PV_PAGE) | KVM_MSR_ENABLED);
	guest_access(self->vcpu, slot, GUEST_SWEEP, 0, 0);
	assert_only_kvm_accessed(self->vcpu);
	TEST_ASSERT(steal->version && !(steal->version & 1),
		    "Steal time should be valid, got version %u", steal->version);
	read_after_kvm(self->vcpu, slot);
}

#elif defined(__aarch64__)

static void guest_steal_time(void)
{
	GUEST_SYNC(guest_get_steal_time());
	userfault_guest_code();
}

TEST_F(pv, steal_time_does_not_exit)
{
	struct userfault_slot *slot = &self->slot;
	u64 ipa = userfault_gpa(slot, PV_PAGE);

	/* KVM writes a revision and attributes of 0, and the time. */
	memset(page_contents, 0xff, getpagesize());
	if (!vcpu_set_steal_time(self->vcpu, ipa))
		SKIP(return, "no steal time");

	vcpu_arch_set_entry_point(self->vcpu, guest_steal_time);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), ipa);
	assert_only_kvm_accessed(self->vcpu);
	TEST_ASSERT_EQ(*userfault_page(slot, PV_PAGE), 0);
	TEST_ASSERT_EQ(read_after_kvm(self->vcpu, slot), 0);
}

#endif

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
