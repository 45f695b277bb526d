// SPDX-License-Identifier: GPL-2.0
/*
 * Test KVM_MEM_USERFAULT_ADDR: pages that are there are looked up in another
 * mapping than userspace's while userfault is on, and KVM follows what becomes of
 * that.
 */
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>

#include <linux/userfaultfd.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>

#include "hyperv.h"
#endif

#include "kvm_userfault_util.h"
#include "processor.h"

#include "kvm_test_harness.h"

#define TEST_NPAGES	67
#define NR_VCPUS	4
#define NR_TOGGLES	100

/* A slot of shared memory, and @mem, a second mapping of it, for the vCPU. */
FIXTURE(addr) {
	struct kvm_vcpu *vcpu;
	struct userfault_slot slot;
	size_t size;
};

FIXTURE_SETUP(addr)
{
	struct userfault_slot *slot = &self->slot;

	userfault_slot_add(slot, vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code),
			   VM_MEM_SRC_SHMEM, USERFAULT_GPA, TEST_NPAGES);
	slot->vcpu_addr = (u64)slot->mem;
	self->size = TEST_NPAGES * slot->page_size;
	userfault_fill_all(slot);
}

FIXTURE_TEARDOWN(addr)
{
	kvm_vm_free(self->slot.vm);
}

/* Where userspace has the slot's memory */
static void *others_page(struct userfault_slot *slot, u64 page)
{
	return addr_gpa2hva(slot->vm, userfault_gpa(slot, page));
}

/* Have other memory where a page that is there is looked up, and none in the file. */
static void replace_page(struct userfault_slot *slot, u64 page, u64 val)
{
	u64 *mem = mmap(userfault_page(slot, page), slot->page_size, PROT_READ | PROT_WRITE,
			MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(mem == userfault_page(slot, page), "mmap() should replace a page, errno %d",
		    errno);
	*mem = val;
}

TEST_F(addr, vcpu_goes_there)
{
	struct userfault_slot *slot = &self->slot;

	TEST_ASSERT_EQ(mprotect(others_page(slot, 0), self->size, PROT_NONE), 0);
	userfault_set_all(slot);
	userfault_on(slot);

	guest_read_faults(self->vcpu, slot, 0);
	guest_read_faults(self->vcpu, slot, TEST_NPAGES - 1);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_WRITE, 0, 0xabcd), 0xabcd);
	TEST_ASSERT_EQ(*userfault_page(slot, 0), 0xabcd);

	/* Without the address, the vCPU has to be content with what is there. */
	userfault_off(slot);
	guest_prepare(slot, GUEST_READ, 0, 0);
	TEST_ASSERT_EQ(run_marked(self->vcpu), -1);
	TEST_ASSERT_EQ(errno, EFAULT);
	TEST_ASSERT_EQ(mprotect(others_page(slot, 0), self->size, PROT_READ | PROT_WRITE), 0);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0xabcd);
}

TEST_F(addr, what_changes_there_is_seen)
{
	struct userfault_slot *slot = &self->slot;

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 3);
	replace_page(slot, 3, 0x1234);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, 3, 0), 0x1234);
	guest_read_filled(self->vcpu, slot, 2);
	guest_read_filled(self->vcpu, slot, 4);

	/* A bit that is set comes before the page is gone. */
	userfault_set_bit(slot, 4);
	replace_page(slot, 4, 0x5678);
	guest_prepare(slot, GUEST_READ, 4, 0);
	run_to_userfault(self->vcpu, slot, 4);
	userfault_publish(slot, 4);
	TEST_ASSERT_EQ(run_to_done(self->vcpu), 0x5678);
}

TEST_F(addr, what_changes_elsewhere_is_not)
{
	struct userfault_slot *slot = &self->slot;
	u64 *mem;

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 3);
	mem = mmap(others_page(slot, 3), slot->page_size, PROT_READ | PROT_WRITE,
		   MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem == others_page(slot, 3), "mmap() should replace a page, errno %d", errno);
	*mem = 0x9abc;
	guest_read_filled(self->vcpu, slot, 3);

	userfault_off(slot);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, 3, 0), 0x9abc);
}

/* Nothing that was mapped from there remains, and nobody goes by it any more. */
TEST_F(addr, off_goes_back)
{
	struct userfault_slot *slot = &self->slot;
	int i;

	for (i = 0; i < 3; i++) {
		replace_page(slot, i, 0x1234);
		userfault_on(slot);
		TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, i, 0), 0x1234);
		userfault_off(slot);
		guest_read_filled(self->vcpu, slot, i);
		guest_access(self->vcpu, slot, GUEST_WRITE, i, 0x4321);
		TEST_ASSERT_EQ(*userfault_page(slot, i), 0x1234);
	}

	TEST_ASSERT(mmap(slot->mem, self->size, PROT_NONE,
			 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == slot->mem,
		    "The mapping should go, errno %d", errno);
	guest_read_filled(self->vcpu, slot, i);
	slot->vcpu_addr = 0;
	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, i);
}

TEST_F(addr, slot_goes_before_the_mapping)
{
	struct userfault_slot *slot = &self->slot;
	struct kvm_userspace_memory_region2 region;

	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 0);
	region = memslot2region(slot->vm, slot->id)->region;
	region.memory_size = 0;
	vm_ioctl(slot->vm, KVM_SET_USER_MEMORY_REGION2, &region);
	replace_page(slot, 0, 0x1234);

	/* Born with the flag, and back where it was. */
	region = memslot2region(slot->vm, slot->id)->region;
	vm_ioctl(slot->vm, KVM_SET_USER_MEMORY_REGION2, &region);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, 0, 0), 0x1234);
	userfault_off(slot);
	guest_read_filled(self->vcpu, slot, 0);
}

/*
 * KVM's own accesses: to where pages are that are there if the bit is clear, and
 * to where userfaultfd can have them wait if it is not.
 */
#define PV_PAGE		2

static bool is_written(u64 *page)
{
	int i;

	for (i = 0; i < 8; i++) {
		if (page[i] != -1ull)
			return true;
	}
	return false;
}

static void forget_what_is_written(struct userfault_slot *slot)
{
	memset(others_page(slot, PV_PAGE), 0xff, slot->page_size);
	memset(userfault_page(slot, PV_PAGE), 0xff, slot->page_size);
}

static void assert_kvm_goes_by_the_bit(struct kvm_vcpu *vcpu, struct userfault_slot *slot,
				       void (*have_kvm_write)(struct kvm_vcpu *vcpu))
{
	replace_page(slot, PV_PAGE, 0);
	forget_what_is_written(slot);
	userfault_set_bit(slot, PV_PAGE);
	userfault_on(slot);
	have_kvm_write(vcpu);
	TEST_ASSERT(is_written(others_page(slot, PV_PAGE)),
		    "KVM should write where userspace has the page");
	TEST_ASSERT(!is_written(userfault_page(slot, PV_PAGE)),
		    "KVM should not write to a page that is not there");

	userfault_off(slot);
	forget_what_is_written(slot);
	userfault_publish(slot, PV_PAGE);
	userfault_on(slot);
	have_kvm_write(vcpu);
	TEST_ASSERT(is_written(userfault_page(slot, PV_PAGE)),
		    "KVM should write to the page that is there");
	TEST_ASSERT(!is_written(others_page(slot, PV_PAGE)),
		    "KVM should not write where userspace has the page");

	userfault_off(slot);
	forget_what_is_written(slot);
	have_kvm_write(vcpu);
	TEST_ASSERT(is_written(others_page(slot, PV_PAGE)), "KVM should go back");
	TEST_ASSERT(!is_written(userfault_page(slot, PV_PAGE)), "KVM should go back");
}

#ifdef __x86_64__

static void set_msr_and_run(struct kvm_vcpu *vcpu, u32 msr)
{
	vcpu_set_msr(vcpu, msr, USERFAULT_GPA + PV_PAGE * getpagesize() + KVM_MSR_ENABLED);
	run_to_done(vcpu);
}

static void set_system_time(struct kvm_vcpu *vcpu)
{
	set_msr_and_run(vcpu, MSR_KVM_SYSTEM_TIME_NEW);
}

static void set_steal_time(struct kvm_vcpu *vcpu)
{
	set_msr_and_run(vcpu, MSR_KVM_STEAL_TIME);
}

static void set_hv_assist_page(struct kvm_vcpu *vcpu)
{
	set_msr_and_run(vcpu, HV_X64_MSR_VP_ASSIST_PAGE);
}

static void set_wall_clock(struct kvm_vcpu *vcpu)
{
	vcpu_set_msr(vcpu, MSR_KVM_WALL_CLOCK_NEW, USERFAULT_GPA + PV_PAGE * getpagesize());
}

TEST_F(addr, system_time_goes_by_the_bit)
{
	guest_prepare(&self->slot, GUEST_SWEEP, 0, 0);
	assert_kvm_goes_by_the_bit(self->vcpu, &self->slot, set_system_time);
}

TEST_F(addr, steal_time_goes_by_the_bit)
{
	if (!kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME))
		SKIP(return, "no steal time");

	guest_prepare(&self->slot, GUEST_SWEEP, 0, 0);
	assert_kvm_goes_by_the_bit(self->vcpu, &self->slot, set_steal_time);
}

TEST_F(addr, hv_assist_page_goes_by_the_bit)
{
	if (!kvm_has_cap(KVM_CAP_HYPERV))
		SKIP(return, "no Hyper-V interfaces");

	guest_prepare(&self->slot, GUEST_SWEEP, 0, 0);
	assert_kvm_goes_by_the_bit(self->vcpu, &self->slot, set_hv_assist_page);
}

TEST_F(addr, wall_clock_goes_by_the_bit)
{
	assert_kvm_goes_by_the_bit(self->vcpu, &self->slot, set_wall_clock);
}

/* By the vCPU, or by KVM if it shadows them */
TEST_F(addr, page_tables_are_walked_there)
{
	struct userfault_slot *slot = &self->slot;
	u64 last = TEST_NPAGES - 1;
	u64 far = SZ_1G / slot->page_size;

	memset(slot->mem, 0, 4 * slot->page_size);
	slot->vm->memslots[MEM_REGION_PT] = slot->id;
	virt_map(slot->vm, userfault_gpa(slot, far), userfault_gpa(slot, last), 1);
	TEST_ASSERT(*userfault_page(slot, 0), "The slot should have page tables");

	TEST_ASSERT_EQ(mprotect(others_page(slot, 0), self->size, PROT_NONE), 0);
	userfault_on(slot);
	TEST_ASSERT_EQ(guest_access(self->vcpu, slot, GUEST_READ, far, 0),
		       userfault_pattern(last));
}

#elif defined(__aarch64__)

static void guest_steal_time(void)
{
	for (;;)
		GUEST_SYNC(guest_get_steal_time());
}

static void get_steal_time(struct kvm_vcpu *vcpu)
{
	TEST_ASSERT_EQ(run_to_done(vcpu), USERFAULT_GPA + PV_PAGE * getpagesize());
}

TEST_F(addr, steal_time_goes_by_the_bit)
{
	if (!vcpu_set_steal_time(self->vcpu, USERFAULT_GPA + PV_PAGE * getpagesize()))
		SKIP(return, "no steal time");

	vcpu_arch_set_entry_point(self->vcpu, guest_steal_time);
	assert_kvm_goes_by_the_bit(self->vcpu, &self->slot, get_steal_time);
}

static void vcpu_reset(struct kvm_vcpu *vcpu)
{
	u64 sp = vcpu_get_reg(vcpu, ctxt_reg_alias(vcpu, SYS_SP_EL1));

	aarch64_vcpu_setup(vcpu, &vcpu->init);
	vcpu_set_reg(vcpu, ctxt_reg_alias(vcpu, SYS_SP_EL1), sp);
	vcpu_arch_set_entry_point(vcpu, userfault_guest_code);
}

/* Whether a page that was mapped has to be mapped again when the vCPU is reset. */
static bool reset_unmaps(struct kvm_vcpu *vcpu, struct userfault_slot *slot, u64 page)
{
	bool unmapped;

	guest_read_filled(vcpu, slot, page);
	vcpu_reset(vcpu);
	/* Of no effect while the page is mapped */
	userfault_set_bit(slot, page);
	guest_prepare(slot, GUEST_READ, page, 0);
	unmapped = run_marked(vcpu);
	userfault_publish(slot, page);
	if (unmapped)
		TEST_ASSERT_EQ(run_to_done(vcpu), userfault_pattern(page));
	return unmapped;
}

/* It is if the guest may access memory around the caches until its MMU is on. */
TEST_F(addr, reset_unmaps_what_is_mapped_there)
{
	struct userfault_slot *slot = &self->slot;

	slot->vcpu_addr = 0;
	userfault_on(slot);
	if (!reset_unmaps(self->vcpu, slot, 3))
		SKIP(return, "nothing is unmapped: the host has S2FWB");

	userfault_off(slot);
	slot->vcpu_addr = (u64)slot->mem;
	kvm_munmap(others_page(slot, 0), self->size);
	userfault_on(slot);
	TEST_ASSERT(reset_unmaps(self->vcpu, slot, 3), "The page should not stay mapped");
}

#endif

TEST_F(addr, dirty_pages_are_logged)
{
	struct userfault_slot *slot = &self->slot;
	unsigned long *log = calloc(1, userfault_bitmap_bytes(align_up(TEST_NPAGES, 64)));

	slot->base_flags = KVM_MEM_LOG_DIRTY_PAGES;
	userfault_on(slot);
	guest_access(self->vcpu, slot, GUEST_WRITE, 3, 1);
	userfault_off(slot);
	guest_access(self->vcpu, slot, GUEST_WRITE, 5, 1);
	kvm_vm_get_dirty_log(slot->vm, slot->id, log);
	TEST_ASSERT_EQ(log[0], BIT(3) | BIT(5));
	guest_access(self->vcpu, slot, GUEST_WRITE, 3, 2);
	kvm_vm_get_dirty_log(slot->vm, slot->id, log);
	TEST_ASSERT_EQ(log[0], BIT(3));
	free(log);
}

TEST_F(addr, bad_values_are_refused)
{
	struct userfault_slot *slot = &self->slot;
	struct kvm_vm *vm = slot->vm;
	struct kvm_userspace_memory_region2 region, good;

	good = memslot2region(vm, slot->id)->region;
	good.flags = KVM_MEM_USERFAULT | KVM_MEM_USERFAULT_ADDR;
	good.userfault_bitmap = (u64)slot->bitmap;
	good.userfault_addr = slot->vcpu_addr;

	region = good;
	region.userfault_addr = 0;
	assert_refused(vm, "no address", region, EINVAL);
	region.userfault_addr = good.userfault_addr + 8;
	assert_refused(vm, "misaligned", region, EINVAL);
	region.userfault_addr = -(u64)region.memory_size;
	assert_refused(vm, "not in userspace", region, EINVAL);

	region = good;
	region.flags = KVM_MEM_USERFAULT_ADDR;
	assert_refused(vm, "without a bitmap", region, EINVAL);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &good);
	region = good;
	region.userfault_addr += slot->page_size;
	assert_refused(vm, "another address while on", region, EINVAL);
	region.flags = KVM_MEM_USERFAULT;
	assert_refused(vm, "none while on", region, EINVAL);

	userfault_off(slot);
	region = good;
	region.flags = KVM_MEM_USERFAULT;
	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);
	assert_refused(vm, "an address while on", good, EINVAL);
	guest_read_filled(self->vcpu, slot, 0);
}

/*
 * vCPUs read and write all pages, again and again, while userfault goes on and
 * off.  There is other memory behind the address, and at the other one are pages
 * that a write replaces: KVM must never take one for another.
 */
#define ELSEWHERE	0x7000u

static bool guest_stop;

static void guest_sweep(u64 base, u64 npages, u64 page_size)
{
	u64 *page;
	u64 i, val;

	do {
		for (i = 0; i < npages; i++) {
			page = (u64 *)(base + i * page_size);
			val = READ_ONCE(page[0]);
			GUEST_ASSERT(val == userfault_pattern(i) || val == ELSEWHERE + i);
		}
		for (i = 0; i < npages; i++) {
			page = (u64 *)(base + i * page_size);
			WRITE_ONCE(page[1], val);
		}
	} while (!READ_ONCE(guest_stop));

	GUEST_DONE();
}

static void *sweeping_vcpu(void *vcpu)
{
	run_to_the_end(vcpu);
	return NULL;
}

TEST(toggle_between_different_pages)
{
	struct kvm_vcpu *vcpus[NR_VCPUS];
	pthread_t threads[NR_VCPUS];
	struct userfault_slot slot;
	size_t size;
	u64 i;
	int n;

	userfault_slot_add(&slot, vm_create_with_vcpus(NR_VCPUS, guest_sweep, vcpus),
			   VM_MEM_SRC_SHMEM, USERFAULT_GPA, TEST_NPAGES);
	size = TEST_NPAGES * slot.page_size;
	userfault_fill_all(&slot);
	TEST_ASSERT(mmap(others_page(&slot, 0), size, PROT_READ | PROT_WRITE,
			 MAP_FIXED | MAP_PRIVATE,
			 memslot2region(slot.vm, slot.id)->fd, 0) == others_page(&slot, 0),
		    "A private mapping should replace the shared one, errno %d", errno);
	slot.vcpu_addr = (u64)kvm_mmap(size, PROT_READ | PROT_WRITE,
				       MAP_SHARED | MAP_ANONYMOUS, -1);
	for (i = 0; i < TEST_NPAGES; i++)
		*(u64 *)(slot.vcpu_addr + i * slot.page_size) = ELSEWHERE + i;

	for (n = 0; n < NR_VCPUS; n++) {
		vcpu_args_set(vcpus[n], 3, slot.gpa, (u64)TEST_NPAGES, slot.page_size);
		kvm_pthread_create(&threads[n], NULL, sweeping_vcpu, vcpus[n]);
	}
	for (n = 0; n < NR_TOGGLES; n++) {
		userfault_on(&slot);
		userfault_off(&slot);
		TEST_ASSERT_EQ(madvise(others_page(&slot, 0), size, MADV_DONTNEED), 0);
	}
	write_guest_global(slot.vm, guest_stop, true);
	for (n = 0; n < NR_VCPUS; n++)
		kvm_pthread_join(threads[n], NULL);

	/* What the guest has written to the one is not in the other. */
	for (i = 0; i < TEST_NPAGES; i++)
		TEST_ASSERT_EQ(userfault_page(&slot, i)[1], 0);
	kvm_vm_free(slot.vm);
}

/* What the address is for: 4 KiB of a huge page that is not complete */
FIXTURE(huge) {
	struct kvm_vcpu *vcpu;
	struct userfault_slot slot;
	size_t size;
	u64 *watched;		/* The mapping that userfaultfd keeps empty */
	int uffd;
};

FIXTURE_SETUP(huge)
{
	struct userfault_slot *slot = &self->slot;
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_MINOR_HUGETLBFS,
	};
	struct uffdio_register reg = {
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};

	self->size = get_def_hugetlb_pagesz();
	if (!have_hugetlb(self->size))
		SKIP(return, "no free huge page of the default size");
	self->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (self->uffd < 0 || ioctl(self->uffd, UFFDIO_API, &api))
		SKIP(return, "no userfaultfd with minor faults of huge pages");

	userfault_slot_add(slot, vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code),
			   VM_MEM_SRC_SHARED_HUGETLB, USERFAULT_GPA,
			   self->size / getpagesize());
	slot->vcpu_addr = (u64)slot->mem;
	self->watched = others_page(slot, 0);
	reg.range.start = (u64)self->watched;
	reg.range.len = self->size;
	TEST_ASSERT(!ioctl(self->uffd, UFFDIO_REGISTER, &reg),
		    "Huge pages should be watched, errno %d", errno);
}

FIXTURE_TEARDOWN(huge)
{
	kvm_vm_free(self->slot.vm);
	close(self->uffd);
}

static void *read_word(void *addr)
{
	return (void *)READ_ONCE(*(u64 *)addr);
}

static bool has_fault(int uffd, int timeout_ms)
{
	struct pollfd pfd = { .fd = uffd, .events = POLLIN };

	return poll(&pfd, 1, timeout_ms) == 1;
}

/* Somebody waits for the huge page: provide what is missing of it. */
static void complete_huge_page(struct userfault_slot *slot, int uffd, void *watched,
			       size_t size)
{
	struct uffdio_continue cont = {
		.range = { .start = (u64)watched, .len = size },
	};
	u64 i;

	TEST_ASSERT(has_fault(uffd, 60000), "Somebody should wait in userfaultfd");
	for (i = 0; i < slot->npages; i++) {
		if (userfault_bit_is_set(slot, i)) {
			userfault_fill(slot, i);
			userfault_publish(slot, i);
		}
	}
	TEST_ASSERT(!ioctl(uffd, UFFDIO_CONTINUE, &cont),
		    "UFFDIO_CONTINUE should succeed, errno %d", errno);
}

TEST_F_TIMEOUT(huge, vcpu_has_pages_of_an_incomplete_one, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	pthread_t thread;
	void *word;

	userfault_set_all(slot);
	userfault_on(slot);
	guest_read_faults(self->vcpu, slot, 5);
	guest_read_faults(self->vcpu, slot, slot->npages - 1);
	guest_prepare(slot, GUEST_READ, 6, 0);
	run_to_userfault(self->vcpu, slot, 6);
	TEST_ASSERT(!has_fault(self->uffd, 0), "The vCPU should not be seen by userfaultfd");

	/* Others wait until the huge page is complete. */
	kvm_pthread_create(&thread, NULL, read_word, &self->watched[0]);
	complete_huge_page(slot, self->uffd, self->watched, self->size);
	TEST_ASSERT_EQ(pthread_join(thread, &word), 0);
	TEST_ASSERT_EQ((u64)word, userfault_pattern(0));

	TEST_ASSERT_EQ(run_to_done(self->vcpu), userfault_pattern(6));
	userfault_off(slot);
	guest_read_filled(self->vcpu, slot, 7);
}

#ifdef __x86_64__

static void *set_wall_clock_thread(void *vcpu)
{
	set_wall_clock(vcpu);
	return NULL;
}

TEST_F_TIMEOUT(huge, kvm_has_pages_of_an_incomplete_one, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	pthread_t thread;

	userfault_set_all(slot);
	userfault_fill(slot, PV_PAGE);
	userfault_publish(slot, PV_PAGE);
	userfault_on(slot);
	guest_prepare(slot, GUEST_SWEEP, 0, 0);
	set_wall_clock(self->vcpu);
	set_system_time(self->vcpu);
	TEST_ASSERT(!has_fault(self->uffd, 0), "KVM should not wait for what is there");
	TEST_ASSERT(*userfault_page(slot, PV_PAGE) != userfault_pattern(PV_PAGE),
		    "KVM should have written to the page");

	/* It can't exit for what is not there. */
	userfault_off(slot);
	userfault_set_bit(slot, PV_PAGE);
	userfault_on(slot);
	kvm_pthread_create(&thread, NULL, set_wall_clock_thread, self->vcpu);
	complete_huge_page(slot, self->uffd, self->watched, self->size);
	kvm_pthread_join(thread, NULL);
	guest_read_filled(self->vcpu, slot, 7);
}

#endif

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT_ADDR));

	return test_harness_run(argc, argv);
}
