// SPDX-License-Identifier: GPL-2.0
/*
 * Try to break KVM Userfault's ordering: vCPUs fault while pages are filled and
 * published, while bits are set again and pages are taken away, and while the
 * bitmap itself is not in memory.
 */
#include <pthread.h>
#include <sched.h>

#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>

#include "kvm_userfault_util.h"
#include "processor.h"
#include "userfaultfd_util.h"

#include "kvm_test_harness.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT	21
#endif

#define NR_VCPUS	4
#define NR_ROUNDS	12
#define MAX_ROUNDS	300
#define NR_REARMS	300
#define TEST_NPAGES	70

/*
 * Several vCPUs of one slot, each run by a thread that does nothing about an
 * exit but to enter the guest again: somebody else publishes.
 */
struct race_vcpu {
	struct userfault_slot *slot;
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	u64 exited_for;		/* The page of the last exit, or NO_PAGE */
	u64 late_exits;		/* How many found their bit clear */
};

#define NO_PAGE		-1ull

FIXTURE(race) {
	struct userfault_slot slot;
	struct race_vcpu races[NR_VCPUS];
};

FIXTURE_VARIANT(race) {
	enum vm_mem_backing_src_type src_type;
};

FIXTURE_VARIANT_ADD(race, anonymous) {
	.src_type = VM_MEM_SRC_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(race, shmem) {
	.src_type = VM_MEM_SRC_SHMEM,
};

FIXTURE_VARIANT_ADD(race, guest_memfd) {
	.src_type = VM_MEM_SRC_GUEST_MEMFD,
};

FIXTURE_SETUP(race)
{
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_vm *vm;
	int i;

	if (variant->src_type == VM_MEM_SRC_GUEST_MEMFD &&
	    !(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_INIT_SHARED))
		SKIP(return, "no guest_memfd that can be mapped");

	vm = vm_create_with_vcpus(NR_VCPUS, NULL, vcpus);
	for (i = 0; i < NR_VCPUS; i++)
		self->races[i] = (struct race_vcpu) { &self->slot, vcpus[i] };

	userfault_slot_add(&self->slot, vm, variant->src_type, USERFAULT_GPA, TEST_NPAGES);
	self->slot.base_flags = memslot2region(vm, self->slot.id)->region.flags;
}

FIXTURE_TEARDOWN(race)
{
	kvm_vm_free(self->slot.vm);
}

/* Run the guest until it says that it is done. */
static void *race_thread(void *arg)
{
	struct race_vcpu *race = arg;
	struct userfault_slot *slot = race->slot;
	struct kvm_vcpu *vcpu = race->vcpu;
	struct ucall uc;
	u64 page;
	int r;

	while ((r = run_marked(vcpu))) {
		page = (vcpu->run->memory_fault.gpa - slot->gpa) / slot->page_size;
		assert_memory_fault(vcpu, r, userfault_gpa(slot, page), slot->page_size,
				    KVM_MEMORY_EXIT_FLAG_USERFAULT);
		TEST_ASSERT(page < slot->npages, "Fault should be in the slot, got gpa 0x%llx",
			    vcpu->run->memory_fault.gpa);
		if (!userfault_bit_is_set(slot, page))
			race->late_exits++;
		WRITE_ONCE(race->exited_for, page);
		sched_yield();
	}

	if (get_ucall(vcpu, &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	TEST_ASSERT_EQ(uc.cmd, UCALL_SYNC);
	return NULL;
}

static void race_start(struct race_vcpu *races)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		races[i].exited_for = NO_PAGE;
		kvm_pthread_create(&races[i].thread, NULL, race_thread, &races[i]);
	}
}

/* Wait until one of the vCPUs can't go on without the page. */
static void race_wait_for_exit(struct race_vcpu *races, u64 page)
{
	int i = 0;

	while (READ_ONCE(races[i].exited_for) != page) {
		i = (i + 1) % NR_VCPUS;
		sched_yield();
	}
}

static void race_join(struct race_vcpu *races)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_join(races[i].thread, NULL);
}

/*
 * Each word of each page has to be the one of this round.  Those written last
 * come first: a page that became visible too early is most likely stale there.
 */
static void guest_check_order(u64 base, u64 npages, u64 page_size, u64 step)
{
	u64 round, page, i;
	u64 *words;

	for (round = 1; ; round += step) {
		for (page = 0; page < npages; page++) {
			words = (u64 *)(base + page * page_size);
			for (i = page_size / sizeof(u64); i-- > 0;)
				GUEST_ASSERT_EQ(READ_ONCE(words[i]), round << 32 | page);
		}
		GUEST_SYNC(round);
	}
}

/* Have the vCPUs expect the first round, and then one that is @step higher. */
static void prepare_check_order(struct race_vcpu *races, u64 step)
{
	struct userfault_slot *slot = races->slot;
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		vcpu_arch_set_entry_point(races[i].vcpu, guest_check_order);
		vcpu_args_set(races[i].vcpu, 4, slot->gpa, slot->npages,
			      slot->page_size, step);
	}
}

static void fill_in_order(struct userfault_slot *slot, u64 round, u64 page)
{
	u64 *words = userfault_page(slot, page);
	u64 i;

	for (i = 0; i < slot->page_size / sizeof(u64); i++)
		WRITE_ONCE(words[i], round << 32 | page);
}

/*
 * One thread fills pages and publishes them while vCPUs wait for them.
 *
 *   this thread                      a vCPU
 *   -----------                      ------
 *   write all words of the page      read the bit, load-acquire, and find it
 *   clear the bit, store-release       clear (kvm_userfault_bit_acquire())
 *                                    look up and map the page
 *                                    the guest reads the words
 *
 * The release in userfault_publish() pairs with KVM's acquire, so no word may
 * be one of the round before, which is what the page held until it was filled.
 * A vCPU exits for the page again and again meanwhile.  (A host whose stores and
 * loads are in order anyway, like x86, can't show that a barrier is missing.)
 */
TEST_F_TIMEOUT(race, published_page_is_never_stale, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	u64 round, page;

	prepare_check_order(self->races, 1);
	for (round = 1; round <= NR_ROUNDS; round++) {
		/* Turning it on unmaps what the round before has mapped. */
		userfault_set_all(slot);
		userfault_on(slot);
		race_start(self->races);
		for (page = 0; page < slot->npages; page++) {
			race_wait_for_exit(self->races, page);
			fill_in_order(slot, round, page);
			userfault_publish(slot, page);
		}
		race_join(self->races);
		userfault_off(slot);
	}
}

static bool guest_stop;

static void guest_read_until_stopped(u64 addr)
{
	while (!READ_ONCE(guest_stop))
		GUEST_ASSERT_NE(READ_ONCE(*(u64 *)addr), 0);
	GUEST_SYNC(0);
}

/* Drop the page's contents, which takes it away from the guest as well. */
static void drop_page(struct userfault_slot *slot, u64 page)
{
	struct userspace_mem_region *region = memslot2region(slot->vm, slot->id);
	u64 offset = page * slot->page_size;

	if (region->fd < 0)
		kvm_madvise(userfault_page(slot, page), slot->page_size, MADV_DONTNEED);
	else
		kvm_fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      offset, slot->page_size);
}

/*
 * Setting a bit unmaps nothing.  But when a page is dropped after its bit was
 * set, a vCPU that had found the bit clear must not map the page of zeros that
 * would appear in its place: KVM reads mmu_invalidate_seq before the bit, so it
 * sees that the page was taken away in between, and begins again.
 */
TEST_F_TIMEOUT(race, dropped_page_is_trapped, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	const u64 page = 5;
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		vcpu_arch_set_entry_point(self->races[i].vcpu, guest_read_until_stopped);
		vcpu_args_set(self->races[i].vcpu, 1, userfault_gpa(slot, page));
	}

	userfault_set_all(slot);
	userfault_on(slot);
	race_start(self->races);
	for (i = 0; i < NR_REARMS; i++) {
		*userfault_page(slot, page) = i + 1;
		userfault_publish(slot, page);
		usleep(i % 8 * 50);
		userfault_set_bit(slot, page);
		drop_page(slot, page);
		usleep(i % 4 * 50);
	}
	*userfault_page(slot, page) = i + 1;
	userfault_publish(slot, page);
	write_guest_global(slot->vm, guest_stop, true);
	race_join(self->races);
}

struct flipper {
	struct userfault_slot *slot;
	bool stop;
};

static void *flip_bits(void *arg)
{
	struct flipper *flipper = arg;
	u64 page = 0;

	while (!READ_ONCE(flipper->stop)) {
		userfault_set_bit(flipper->slot, page);
		userfault_publish(flipper->slot, page);
		page = (page + 1) % flipper->slot->npages;
	}
	return NULL;
}

/*
 * An exit tells what was, not what is: the bit may be clear by the time that
 * userspace sees it.  All there is to do then is to enter the guest again.
 */
TEST_F_TIMEOUT(race, exit_outlives_its_bit, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	struct flipper flipper = { .slot = slot };
	u64 page, late_exits = 0;
	pthread_t thread;
	int i, round;

	prepare_check_order(self->races, 0);
	for (page = 0; page < slot->npages; page++)
		fill_in_order(slot, 1, page);

	kvm_pthread_create(&thread, NULL, flip_bits, &flipper);
	/* Each bit is set for a moment only: as many rounds as it takes */
	for (round = 0; round < NR_ROUNDS || (!late_exits && round < MAX_ROUNDS); round++) {
		userfault_on(slot);
		race_start(self->races);
		race_join(self->races);
		userfault_off(slot);
		for (i = 0; i < NR_VCPUS; i++)
			late_exits += self->races[i].late_exits;
	}
	WRITE_ONCE(flipper.stop, true);
	kvm_pthread_join(thread, NULL);
	if (!late_exits)
		SKIP(return, "no bit was clear by the time that userspace saw the exit");
}

/* One vCPU, and a bitmap that is not there when KVM reads it. */
FIXTURE(bitmap) {
	struct kvm_vcpu *vcpu;
	struct userfault_slot slot;
};

FIXTURE_SETUP(bitmap)
{
	userfault_slot_add(&self->slot, vm_create_with_one_vcpu(&self->vcpu, userfault_guest_code),
			   VM_MEM_SRC_ANONYMOUS, USERFAULT_GPA, TEST_NPAGES);
	userfault_fill_all(&self->slot);
}

FIXTURE_TEARDOWN(bitmap)
{
	kvm_vm_free(self->vcpu->vm);
}

static unsigned long *bitmap_contents;

static int provide_bitmap(int mode, int uffd, struct uffd_msg *msg)
{
	struct uffdio_copy copy = {
		.src = (u64)bitmap_contents,
		.dst = align_down(msg->arg.pagefault.address, getpagesize()),
		.len = getpagesize(),
	};

	return ioctl(uffd, UFFDIO_COPY, &copy);
}

/* KVM waits for a bitmap that userfaultfd provides, like anybody else would. */
TEST_F_TIMEOUT(bitmap, may_be_demand_paged, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	struct uffd_desc *uffd;

	TEST_ASSERT_EQ(slot->bitmap_size, getpagesize());
	bitmap_contents = kvm_mmap(getpagesize(), PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1);
	bitmap_contents[5 / BITS_PER_BITMAP_WORD] = 1UL << 5;

	kvm_madvise(slot->bitmap, slot->bitmap_size, MADV_DONTNEED);
	uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 1000, slot->bitmap,
					slot->bitmap_size, 1, provide_bitmap);
	userfault_on(slot);
	guest_read_filled(self->vcpu, slot, 4);
	guest_read_faults(self->vcpu, slot, 5);

	/* Again, and the fault comes while KVM is to find a set bit. */
	bitmap_contents[0] = 1UL << 6;
	kvm_madvise(slot->bitmap, slot->bitmap_size, MADV_DONTNEED);
	guest_read_faults(self->vcpu, slot, 6);
	uffd_stop_demand_paging(uffd);
}

/* Taken out of the page table, or of memory, the bitmap means what it meant. */
TEST_F_TIMEOUT(bitmap, may_be_reclaimed, USERFAULT_TIMEOUT)
{
	struct userfault_slot *slot = &self->slot;
	int fd = kvm_memfd_alloc(slot->bitmap_size, false);
	u64 page;

	kvm_munmap(slot->bitmap, slot->bitmap_size);
	slot->bitmap = kvm_mmap(slot->bitmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	userfault_set_all(slot);
	userfault_on(slot);
	for (page = 0; page < TEST_NPAGES; page++) {
		/* Without swap, MADV_PAGEOUT leaves a page that is not in a file. */
		kvm_madvise(slot->bitmap, slot->bitmap_size,
			    page & 1 ? MADV_DONTNEED : MADV_PAGEOUT);
		guest_read_faults(self->vcpu, slot, page);
	}
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
