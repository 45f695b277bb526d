// SPDX-License-Identifier: GPL-2.0
/*
 * Test userfaultfd on mappings of a guest_memfd: what goes through the mapping is
 * caught, what the guest does is not, and both see the same pages.
 */
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>

#include "kvm_userfault_util.h"

#include "kvm_test_harness.h"

#define TEST_NPAGES	32

/* How long nothing has to happen to be taken for nothing, in milliseconds */
#define QUIET_MS	200

struct uffd_vm {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct userfault_slot slot;
	int gmem;
	int uffd;
	u8 *watched;		/* The mapping of all pages that uffd watches */
	size_t size;
};

/* Somebody who reads the first word of a page through the watched mapping. */
struct reader {
	pthread_t thread;
	u64 *addr;
	u64 value;
};

FIXTURE(uffd) {
	struct uffd_vm uvm;
};

static int open_uffd(u64 features)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_GUEST_MEMFD | features,
	};
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	TEST_ASSERT(fd >= 0, "userfaultfd should be allowed, errno %d", errno);
	TEST_ASSERT(!ioctl(fd, UFFDIO_API, &api),
		    "UFFDIO_API with UFFD_FEATURE_GUEST_MEMFD should succeed, errno %d", errno);
	return fd;
}

static int try_register(int uffd, void *mem, size_t size, u64 mode, u64 *ioctls)
{
	struct uffdio_register reg = {
		.range = { .start = (u64)mem, .len = size },
		.mode = mode,
	};
	int r = ioctl(uffd, UFFDIO_REGISTER, &reg);

	if (ioctls)
		*ioctls = reg.ioctls;
	return r;
}

static void watch(struct uffd_vm *uvm, u64 mode)
{
	TEST_ASSERT(!try_register(uvm->uffd, uvm->watched, uvm->size, mode, NULL),
		    "Mode 0x%lx should be possible, errno %d", mode, errno);
}

FIXTURE_SETUP(uffd)
{
	struct uffd_vm *uvm = &self->uvm;

	uvm->vm = vm_create_with_one_vcpu(&uvm->vcpu, userfault_guest_code);
	userfault_slot_add(&uvm->slot, uvm->vm, VM_MEM_SRC_GUEST_MEMFD, USERFAULT_GPA,
			   TEST_NPAGES);
	uvm->gmem = memslot2region(uvm->vm, uvm->slot.id)->region.guest_memfd;
	uvm->size = TEST_NPAGES * uvm->slot.page_size;
	uvm->watched = addr_gpa2hva(uvm->vm, USERFAULT_GPA);
	uvm->uffd = open_uffd(0);
}

FIXTURE_TEARDOWN(uffd)
{
	close(self->uvm.uffd);
	kvm_vm_free(self->uvm.vm);
}

static void *reader_fn(void *arg)
{
	struct reader *reader = arg;

	reader->value = READ_ONCE(*reader->addr);
	return NULL;
}

static void *writer_fn(void *addr)
{
	WRITE_ONCE(*(u64 *)addr, 1);
	return NULL;
}

static void *watched_page(struct uffd_vm *uvm, u64 page)
{
	return uvm->watched + page * uvm->slot.page_size;
}

static void reader_start(struct reader *reader, struct uffd_vm *uvm, u64 page)
{
	reader->addr = watched_page(uvm, page);
	TEST_ASSERT_EQ(pthread_create(&reader->thread, NULL, reader_fn, reader), 0);
}

static u64 reader_finish(struct reader *reader)
{
	TEST_ASSERT_EQ(pthread_join(reader->thread, NULL), 0);
	return reader->value;
}

static bool has_fault(struct uffd_vm *uvm, int timeout_ms)
{
	struct pollfd pfd = { .fd = uvm->uffd, .events = POLLIN };

	return poll(&pfd, 1, timeout_ms) == 1;
}

/* Wait for the fault that has to come, and check that it is this one. */
static void expect_fault(struct uffd_vm *uvm, u64 page, u64 flags)
{
	struct uffd_msg msg;

	TEST_ASSERT(has_fault(uvm, -1), "poll() should report a fault, errno %d", errno);
	TEST_ASSERT_EQ(read(uvm->uffd, &msg, sizeof(msg)), sizeof(msg));
	TEST_ASSERT_EQ(msg.event, UFFD_EVENT_PAGEFAULT);
	TEST_ASSERT_EQ(msg.arg.pagefault.address, (u64)watched_page(uvm, page));
	TEST_ASSERT_EQ(msg.arg.pagefault.flags, flags);
}

static int copy_page(struct uffd_vm *uvm, u64 page, void *from)
{
	struct uffdio_copy copy = {
		.dst = (u64)watched_page(uvm, page),
		.src = (u64)from,
		.len = uvm->slot.page_size,
	};

	return ioctl(uvm->uffd, UFFDIO_COPY, &copy);
}

static int zero_page(struct uffd_vm *uvm, u64 page)
{
	struct uffdio_zeropage zero = {
		.range = { (u64)watched_page(uvm, page), uvm->slot.page_size },
	};

	return ioctl(uvm->uffd, UFFDIO_ZEROPAGE, &zero);
}

static int continue_pages(struct uffd_vm *uvm, u64 page, u64 nr)
{
	struct uffdio_continue cont = {
		.range = { (u64)watched_page(uvm, page), nr * uvm->slot.page_size },
	};

	return ioctl(uvm->uffd, UFFDIO_CONTINUE, &cont);
}

static int poison_page(struct uffd_vm *uvm, u64 page)
{
	struct uffdio_poison poison = {
		.range = { (u64)watched_page(uvm, page), uvm->slot.page_size },
	};

	return ioctl(uvm->uffd, UFFDIO_POISON, &poison);
}

static void punch_page(struct uffd_vm *uvm, u64 page)
{
	kvm_fallocate(uvm->gmem, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      page * uvm->slot.page_size, uvm->slot.page_size);
}

TEST_F(uffd, missing_page_is_copied)
{
	struct uffd_vm *uvm = &self->uvm;
	u64 *from = kvm_mmap(uvm->slot.page_size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct reader reader;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	*from = userfault_pattern(3);

	reader_start(&reader, uvm, 3);
	expect_fault(uvm, 3, 0);
	TEST_ASSERT_EQ(copy_page(uvm, 3, from), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), userfault_pattern(3));

	/* It is the guest's page, too. */
	guest_read_filled(uvm->vcpu, &uvm->slot, 3);
	guest_access(uvm->vcpu, &uvm->slot, GUEST_WRITE, 3, 1);
	TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, 3), 1);
}

TEST_F(uffd, missing_page_is_zeroed)
{
	struct uffd_vm *uvm = &self->uvm;
	struct reader reader;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	reader_start(&reader, uvm, 0);
	expect_fault(uvm, 0, 0);
	TEST_ASSERT_EQ(zero_page(uvm, 0), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), 0);
}

TEST_F(uffd, write_fault_says_so)
{
	struct uffd_vm *uvm = &self->uvm;
	pthread_t thread;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING);
	TEST_ASSERT_EQ(pthread_create(&thread, NULL, writer_fn, watched_page(uvm, 1)), 0);
	expect_fault(uvm, 1, UFFD_PAGEFAULT_FLAG_WRITE);
	TEST_ASSERT_EQ(zero_page(uvm, 1), 0);
	TEST_ASSERT_EQ(pthread_join(thread, NULL), 0);
}

/* Pages that are filled some other way are there, but not mapped. */
TEST_F(uffd, minor_fault_is_continued)
{
	struct uffd_vm *uvm = &self->uvm;
	struct reader reader;
	u64 i;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	userfault_fill_all(&uvm->slot);

	reader_start(&reader, uvm, 7);
	expect_fault(uvm, 7, UFFD_PAGEFAULT_FLAG_MINOR);
	TEST_ASSERT_EQ(continue_pages(uvm, 7, 1), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), userfault_pattern(7));

	TEST_ASSERT_EQ(continue_pages(uvm, 8, TEST_NPAGES - 8), 0);
	for (i = 8; i < TEST_NPAGES; i++)
		TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, i), userfault_pattern(i));
	TEST_ASSERT(!has_fault(uvm, 0), "Pages that are mapped should not fault");
}

/* fallocate() gets memory for a page and leaves it to others to clear it. */
TEST_F(uffd, allocated_page_is_zeros)
{
	struct uffd_vm *uvm = &self->uvm;
	struct reader reader;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	kvm_fallocate(uvm->gmem, FALLOC_FL_KEEP_SIZE, 0, uvm->size);

	reader_start(&reader, uvm, 2);
	expect_fault(uvm, 2, UFFD_PAGEFAULT_FLAG_MINOR);
	TEST_ASSERT_EQ(continue_pages(uvm, 2, 1), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), 0);
}

/* Nor does it fill the page, which can be copied to, once. */
TEST_F(uffd, allocated_page_is_copied)
{
	struct uffd_vm *uvm = &self->uvm;
	u64 *from = kvm_mmap(uvm->slot.page_size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	kvm_fallocate(uvm->gmem, FALLOC_FL_KEEP_SIZE, 0, uvm->size);
	*from = userfault_pattern(2);

	TEST_ASSERT_EQ(copy_page(uvm, 2, from), 0);
	TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, 2), userfault_pattern(2));
	guest_read_filled(uvm->vcpu, &uvm->slot, 2);
	TEST_ASSERT(copy_page(uvm, 2, from) && errno == EEXIST,
		    "A page that is filled should not be copied to, errno %d", errno);
}

TEST_F(uffd, minor_alone_does_not_see_holes)
{
	struct uffd_vm *uvm = &self->uvm;

	watch(uvm, UFFDIO_REGISTER_MODE_MINOR);
	TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, 5), 0);
	TEST_ASSERT(!has_fault(uvm, 0), "A hole should not raise a minor fault");
}

TEST_F(uffd, missing_alone_does_not_see_pages)
{
	struct uffd_vm *uvm = &self->uvm;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING);
	userfault_fill(&uvm->slot, 5);
	TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, 5), userfault_pattern(5));
	TEST_ASSERT(!has_fault(uvm, 0), "A page that is there should not be missing");
}

TEST_F(uffd, hole_is_missing_again)
{
	struct uffd_vm *uvm = &self->uvm;
	struct reader reader;

	userfault_fill_all(&uvm->slot);
	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	TEST_ASSERT_EQ(continue_pages(uvm, 0, TEST_NPAGES), 0);
	punch_page(uvm, 4);

	reader_start(&reader, uvm, 4);
	expect_fault(uvm, 4, 0);
	TEST_ASSERT_EQ(zero_page(uvm, 4), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), 0);
	TEST_ASSERT_EQ(*(u64 *)watched_page(uvm, 6), userfault_pattern(6));
}

TEST_F(uffd, poison_is_of_the_mapping_only)
{
	struct uffd_vm *uvm = &self->uvm;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	TEST_ASSERT_EQ(poison_page(uvm, 9), 0);
	TEST_EXPECT_SIGBUS((void)READ_ONCE(*(u64 *)watched_page(uvm, 9)));

	userfault_fill(&uvm->slot, 9);
	guest_read_filled(uvm->vcpu, &uvm->slot, 9);
}

TEST_F(uffd, guest_accesses_are_not_reported)
{
	struct uffd_vm *uvm = &self->uvm;

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	userfault_fill(&uvm->slot, 10);
	TEST_ASSERT_EQ(guest_access(uvm->vcpu, &uvm->slot, GUEST_READ, 11, 0), 0);
	guest_read_filled(uvm->vcpu, &uvm->slot, 10);
	TEST_ASSERT(!has_fault(uvm, QUIET_MS), "A vCPU should not need the mapping");
}

/* Both together are what post-copy needs: who wants a page, waits for it. */
TEST_F(uffd, bitmap_and_mapping_wait_for_the_same_page)
{
	struct uffd_vm *uvm = &self->uvm;
	struct reader reader;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	userfault_set_all(&uvm->slot);
	userfault_on(&uvm->slot);

	guest_prepare(&uvm->slot, GUEST_READ, 12, 0);
	run_to_userfault(uvm->vcpu, &uvm->slot, 12);
	reader_start(&reader, uvm, 12);
	expect_fault(uvm, 12, 0);

	userfault_fill(&uvm->slot, 12);
	userfault_publish(&uvm->slot, 12);
	TEST_ASSERT_EQ(run_to_done(uvm->vcpu), userfault_pattern(12));
	TEST_ASSERT_EQ(continue_pages(uvm, 12, 1), 0);
	TEST_ASSERT_EQ(reader_finish(&reader), userfault_pattern(12));
}

TEST_F(uffd, bad_requests)
{
	struct uffd_vm *uvm = &self->uvm;
	u8 *from = kvm_mmap(uvm->slot.page_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1);

	watch(uvm, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	userfault_fill(&uvm->slot, 0);

	TEST_ASSERT(copy_page(uvm, 0, from) && errno == EEXIST,
		    "Copying to a page that is there should fail with EEXIST, errno %d", errno);
	TEST_ASSERT(zero_page(uvm, 0) && errno == EEXIST,
		    "Zeroing a page that is there should fail with EEXIST, errno %d", errno);
	TEST_ASSERT(continue_pages(uvm, 1, 1) && errno == EFAULT,
		    "Continuing a hole should fail with EFAULT, errno %d", errno);
	TEST_ASSERT_EQ(continue_pages(uvm, 0, 1), 0);
	TEST_ASSERT(continue_pages(uvm, 0, 1) && errno == EEXIST,
		    "Continuing a mapped page should fail with EEXIST, errno %d", errno);

	kvm_munmap(from, uvm->slot.page_size);
	TEST_ASSERT(copy_page(uvm, 2, from) && errno == EFAULT,
		    "Copying from nowhere should fail with EFAULT, errno %d", errno);
	TEST_ASSERT_EQ(guest_access(uvm->vcpu, &uvm->slot, GUEST_READ, 2, 0), 0);
}

TEST_F(uffd, register_modes)
{
	struct uffd_vm *uvm = &self->uvm;
	const struct {
		u64 mode;
		bool good;
	} modes[] = {
		{ UFFDIO_REGISTER_MODE_MISSING, true },
		{ UFFDIO_REGISTER_MODE_MINOR, true },
		{ UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR, true },
		{ UFFDIO_REGISTER_MODE_WP, false },
		{ UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP, false },
		{ UFFDIO_REGISTER_MODE_RWP, false },
		{ UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_RWP, false },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		struct uffdio_range range = { (u64)uvm->watched, uvm->size };
		u64 ioctls;
		int r = try_register(uvm->uffd, uvm->watched, uvm->size, modes[i].mode, &ioctls);

		if (!modes[i].good) {
			TEST_ASSERT(r && errno == EINVAL,
				    "Mode 0x%lx should be refused with EINVAL, got %d errno %d",
				    modes[i].mode, r, errno);
			continue;
		}
		TEST_ASSERT(!r, "Mode 0x%lx should be possible, errno %d", modes[i].mode, errno);
		TEST_ASSERT(ioctls & BIT_ULL(_UFFDIO_COPY), "UFFDIO_COPY should be offered");
		TEST_ASSERT_EQ(!!(ioctls & BIT_ULL(_UFFDIO_CONTINUE)),
			       !!(modes[i].mode & UFFDIO_REGISTER_MODE_MINOR));
		TEST_ASSERT_EQ(ioctl(uvm->uffd, UFFDIO_UNREGISTER, &range), 0);
	}
}

TEST_F(uffd, private_memory_is_refused)
{
	struct uffd_vm *uvm = &self->uvm;
	int fd = vm_create_guest_memfd(uvm->vm, uvm->size, GUEST_MEMFD_FLAG_MMAP);
	void *mem = kvm_mmap(uvm->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	int r = try_register(uvm->uffd, mem, uvm->size, UFFDIO_REGISTER_MODE_MISSING, NULL);

	TEST_ASSERT(r && errno == EINVAL,
		    "Private memory should be refused with EINVAL, got %d errno %d", r, errno);
	kvm_munmap(mem, uvm->size);
	close(fd);
}

static void expect_errno(int uffd, unsigned long nr, void *arg, int error, const char *name)
{
	int r = ioctl(uffd, nr, arg);

	TEST_ASSERT(r && errno == error,
		    "%s of private memory should fail with errno %d, got %d errno %d",
		    name, error, r, errno);
}

/* Any memory can be registered for asynchronous write protection. */
TEST_F(uffd, private_memory_is_not_filled)
{
	struct uffd_vm *uvm = &self->uvm;
	size_t size = uvm->slot.page_size;
	int fd = vm_create_guest_memfd(uvm->vm, size, GUEST_MEMFD_FLAG_MMAP);
	void *mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	void *from = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct uffdio_range range = { .start = (u64)mem, .len = size };
	struct uffdio_copy copy = { .dst = (u64)mem, .src = (u64)from, .len = size };
	struct uffdio_zeropage zero = { .range = range };
	struct uffdio_continue cont = { .range = range };
	int uffd = open_uffd(UFFD_FEATURE_WP_ASYNC);

	TEST_ASSERT(!try_register(uffd, mem, size, UFFDIO_REGISTER_MODE_WP, NULL),
		    "Asynchronous write protection should be possible, errno %d", errno);

	expect_errno(uffd, UFFDIO_COPY, &copy, EPERM, "UFFDIO_COPY");
	expect_errno(uffd, UFFDIO_ZEROPAGE, &zero, EPERM, "UFFDIO_ZEROPAGE");
	TEST_ASSERT(!fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size),
		    "fallocate() should succeed, errno %d", errno);
	expect_errno(uffd, UFFDIO_CONTINUE, &cont, EFAULT, "UFFDIO_CONTINUE");

	close(uffd);
	kvm_munmap(from, size);
	kvm_munmap(mem, size);
	close(fd);
}

int main(int argc, char *argv[])
{
	u64 flags = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC);

	TEST_REQUIRE(flags & GUEST_MEMFD_FLAG_MMAP);
	TEST_REQUIRE(flags & GUEST_MEMFD_FLAG_INIT_SHARED);
	__TEST_REQUIRE(uffd >= 0, "userfaultfd, which some users may not use");
	close(uffd);

	return test_harness_run(argc, argv);
}
