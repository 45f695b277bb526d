/*
 * Post-copy migration with KVM Userfault: types of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/madvise.h"
#include "qemu/mmap-alloc.h"
#include "qemu/units.h"
#include "exec/cpu-common.h"
#include "exec/target_page.h"
#include "system/kvm-guest-memfd.h"
#include "system/kvm-userfault.h"
#include "migration.h"
#include "postcopy-kvm-mem.h"
#include "trace.h"

/* What PostcopyKvmMethods.refuse returns if other methods may do. */
static const char other_type[] = "no method for this type of memory";

#ifdef CONFIG_LINUX
#include <sys/ioctl.h>
#include "qemu/userfaultfd.h"
#ifdef CONFIG_NUMA
#include <numaif.h>
#include "system/numa.h"
#endif

/* How much memory is got at once for pages that come one after the other */
#define FILE_POPULATE_BYTES (256 * KiB)

static bool is_hugetlb(RAMBlock *rb)
{
    return rb->page_size > qemu_real_host_page_size();
}

/*
 * Anonymous memory, and private huge pages
 *
 * userfaultfd fills a page and maps it at once, or not at all.
 */

static const char *anonymous_refuse(RAMBlock *rb)
{
    if (qemu_ram_is_shared(rb)) {
        return other_type;
    }
    if (rb->guest_memfd >= 0) {
        return "has private memory";
    }
    if (rb->fd >= 0 && !is_hugetlb(rb)) {
        return "a private mapping of a file";
    }
    return NULL;
}

static int anonymous_fill(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                          const void *from)
{
    return uffd_copy_page(uffd, b->rb->host + offset, (void *)from,
                          b->page_size, false);
}

static int anonymous_fill_zero(PostcopyKvmBlock *b, int uffd,
                               ram_addr_t offset)
{
    if (qemu_ram_is_uf_zeroable(b->rb)) {
        return uffd_zero_page(uffd, b->rb->host + offset, b->page_size, false);
    }

    return anonymous_fill(b, uffd, offset,
                          migration_incoming_get_current()->
                          postcopy_tmp_zero_page);
}

/* If it was discarded, it is a page of zeros again. */
static int anonymous_fill_again(PostcopyKvmBlock *b, int uffd,
                                ram_addr_t offset)
{
    void *host = b->rb->host + offset;
    struct uffdio_zeropage zero = {
        .range = { .start = (uintptr_t)host, .len = b->page_size },
    };
    struct uffdio_copy copy = {
        .dst = (uintptr_t)host,
        .src = (uintptr_t)
               migration_incoming_get_current()->postcopy_tmp_zero_page,
        .len = b->page_size,
    };
    int ret;

    do {
        ret = qemu_ram_is_uf_zeroable(b->rb)
              ? ioctl(uffd, UFFDIO_ZEROPAGE, &zero)
              : ioctl(uffd, UFFDIO_COPY, &copy);
    } while (ret && errno == EAGAIN);

    if (ret && errno == EEXIST) {
        return uffd_wakeup(uffd, host, b->page_size);
    }
    return ret ? -errno : 0;
}

static const PostcopyKvmMethods anonymous_methods = {
    .name = "anonymous",
    .refuse = anonymous_refuse,
    .fill = anonymous_fill,
    .fill_zero = anonymous_fill_zero,
    .fill_again = anonymous_fill_again,
};

/*
 * Shared memory of a memfd, or of a file on tmpfs or hugetlbfs
 *
 * Pages are written through a second mapping, which nobody else uses.  That
 * puts them into the page cache, where KVM and host accesses still do not see
 * them: both go through QEMU's own mapping, which is registered for MINOR
 * faults.  UFFDIO_CONTINUE maps them there.  MISSING is registered as well:
 * without it, a page that never arrived would appear as zeros.
 */

static const char *file_refuse(RAMBlock *rb, unsigned int fs_type,
                               uint64_t feature)
{
    uint64_t features;

    if (rb->fd < 0 || !qemu_ram_is_shared(rb) ||
        qemu_fd_getfs(rb->fd) != fs_type) {
        return other_type;
    }
    if (rb->guest_memfd >= 0) {
        return "has private memory";
    }
    if (uffd_query_features(&features) || !(features & feature)) {
        return "userfaultfd has no minor faults for this type of memory";
    }
    if (QEMU_MADV_POPULATE_WRITE == QEMU_MADV_INVALID) {
        return "built for a kernel without MADV_POPULATE_WRITE";
    }
    return NULL;
}

static const char *memfd_refuse(RAMBlock *rb)
{
    return file_refuse(rb, QEMU_FS_TYPE_TMPFS, UFFD_FEATURE_MINOR_SHMEM);
}

static const char *hugetlb_refuse(RAMBlock *rb)
{
    return file_refuse(rb, QEMU_FS_TYPE_HUGETLBFS,
                       UFFD_FEATURE_MINOR_HUGETLBFS);
}

/*
 * userfaultfd keeps a huge page out of QEMU's mapping until all of it is there.
 * If KVM looks up vCPUs' pages in the second one, they need not wait for that.
 */
static const char *hugetlb_split_refuse(RAMBlock *rb)
{
    const char *why = hugetlb_refuse(rb);

    if (!why && (!kvm_userfault_can_look_elsewhere() ||
                 qemu_target_page_size() != qemu_real_host_page_size())) {
        return other_type;
    }
    return why;
}

/*
 * Huge pages come from the nodes that the mapping is bound to through which
 * they are allocated.  Those of tmpfs from the ones that the file is bound to.
 * Returns 0, or -errno.
 */
static int file_copy_policy(RAMBlock *rb, void *alias)
{
#ifdef CONFIG_NUMA
    /* The system calls take one bit less than they are told. */
    const unsigned long bits = MAX_NODES + 1;
    DECLARE_BITMAP(nodes, MAX_NODES + 1) = { };
    int mode;

    /* Where it can't be asked for, it can't have been set either. */
    if (is_hugetlb(rb) &&
        !get_mempolicy(&mode, nodes, bits, rb->host, MPOL_F_ADDR) &&
        mode != MPOL_DEFAULT &&
        mbind(alias, rb->postcopy_length, mode, nodes, bits, 0)) {
        return -errno;
    }
#endif
    return 0;
}

static int file_prepare(PostcopyKvmBlock *b)
{
    RAMBlock *rb = b->rb;
    void *alias = mmap(NULL, rb->postcopy_length, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_NORESERVE, rb->fd, rb->fd_offset);
    int ret;

    if (alias == MAP_FAILED) {
        return -errno;
    }
    ret = file_copy_policy(rb, alias);
    if (ret) {
        munmap(alias, rb->postcopy_length);
        return ret;
    }
    /* A core dump has what the RAMBlock's own mapping lets it have. */
    qemu_madvise(alias, rb->postcopy_length, QEMU_MADV_DONTDUMP);
    qemu_madvise(alias, rb->postcopy_length, QEMU_MADV_DONTFORK);
    b->alias = alias;
    b->populated = bitmap_new(b->pages / b->per_host_page);
    return 0;
}

/*
 * Have memory for a page before it is written to: if there is none, this is an
 * error, and the migration pauses, where writing would be a SIGBUS and the end
 * of the guest.  Pages that come one after the other get theirs together.
 */
static int file_populate(PostcopyKvmBlock *b, ram_addr_t offset)
{
    size_t size = b->rb->page_size;
    unsigned long page = offset / size;
    unsigned long pages = b->pages / b->per_host_page;
    unsigned long nr = 1;

    if (page == qatomic_read(&b->next)) {
        nr = MIN(MAX(FILE_POPULATE_BYTES / size, 1), pages - page);
    }
    qatomic_set(&b->next, page + 1);
    if (bitmap_test_acquire(b->populated, page)) {
        return 0;
    }

    nr = bitmap_find_next_acquire(b->populated, page + nr, page) - page;
    if (qemu_madvise(b->alias + page * size, nr * size,
                     QEMU_MADV_POPULATE_WRITE)) {
        int ret = -errno;

        error_report("post-copy: no memory for %s+0x%zx: %s", b->rb->idstr,
                     page * size, strerror(errno));
        return ret;
    }
    bitmap_set_range_atomic(b->populated, page, nr);
    return 0;
}

static int file_fill(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                     const void *from)
{
    int ret = file_populate(b, offset);

    if (!ret) {
        memcpy(b->alias + offset, from, b->page_size);
    }
    return ret;
}

static int file_fill_zero(PostcopyKvmBlock *b, int uffd, ram_addr_t offset)
{
    void *to = b->alias + offset;
    int ret = file_populate(b, offset);

    /* Pages come with zeros, but precopy may have left something else. */
    if (!ret && !buffer_is_zero(to, b->page_size)) {
        memset(to, 0, b->page_size);
    }
    return ret;
}

/* Have a page of zeros where the file has a hole. */
static int file_map_hole(PostcopyKvmBlock *b, ram_addr_t offset)
{
    int ret = RETRY_ON_EINTR(fallocate(b->rb->fd, FALLOC_FL_KEEP_SIZE,
                                       b->rb->fd_offset + offset,
                                       b->rb->page_size));

    if (ret) {
        ret = -errno;
        error_report("post-copy: no memory for %s+0x" RAM_ADDR_FMT ": %s",
                     b->rb->idstr, offset, strerror(-ret));
    }
    return ret;
}

/* Returns 0 if it is to be tried again from *@host on, or -errno. */
static int file_map_failed(PostcopyKvmBlock *b, int uffd, uintptr_t *host)
{
    ram_addr_t offset = *host - (uintptr_t)b->rb->host;

    switch (errno) {
    case EAGAIN:
        /* QEMU's address space is being changed, nothing was mapped. */
        return 0;
    case EFAULT:
        /* A hole, i.e. zeros that nobody bothered to write */
        return file_map_hole(b, offset);
    case EEXIST:
        /* Mapped before; somebody may wait all the same. */
        *host += b->rb->page_size;
        return uffd_wakeup(uffd, b->rb->host + offset, b->rb->page_size);
    default:
        error_report("post-copy: UFFDIO_CONTINUE of %s+0x" RAM_ADDR_FMT ": %s",
                     b->rb->idstr, offset, strerror(errno));
        return -errno;
    }
}

static int file_map(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                    size_t len)
{
    uintptr_t host = (uintptr_t)b->rb->host + offset;
    uintptr_t end = host + len;
    int ret = 0;

    while (!ret && host < end) {
        struct uffdio_continue cont = {
            .range = { .start = host, .len = end - host },
        };

        if (!ioctl(uffd, UFFDIO_CONTINUE, &cont)) {
            break;
        }
        if (cont.mapped > 0) {
            host += cont.mapped;
        } else {
            ret = file_map_failed(b, uffd, &host);
        }
    }
    return ret;
}

static void file_finish(PostcopyKvmBlock *b)
{
    if (!b->keep_alias) {
        munmap(b->alias, b->pages * b->page_size);
    }
    g_free(b->populated);
}

static const PostcopyKvmMethods memfd_methods = {
    .name = "memfd",
    .uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
    .refuse = memfd_refuse,
    .prepare = file_prepare,
    .fill = file_fill,
    .fill_zero = file_fill_zero,
    .map = file_map,
    .finish = file_finish,
};

static const PostcopyKvmMethods hugetlb_split_methods = {
    .name = "hugetlb, split",
    .uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
    .refuse = hugetlb_split_refuse,
    .prepare = file_prepare,
    .fill = file_fill,
    .fill_zero = file_fill_zero,
    .map = file_map,
    .direct = true,
    .split = true,
    .finish = file_finish,
};

static const PostcopyKvmMethods hugetlb_methods = {
    .name = "hugetlb",
    .uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
    .refuse = hugetlb_refuse,
    .prepare = file_prepare,
    .fill = file_fill,
    .fill_zero = file_fill_zero,
    .map = file_map,
    .finish = file_finish,
};

/*
 * guest_memfd that is shared with QEMU
 *
 * KVM takes the pages of vCPUs from the file, so a page is theirs as soon as
 * its contents are there and its bit is cleared.  Others go through QEMU's
 * mapping, as with a memfd.  A page that has contents can't be written, and so
 * not by mistake either.
 */

static const char *guest_memfd_refuse(RAMBlock *rb)
{
    uint64_t features;

    if (!qemu_ram_is_guest_memfd(rb)) {
        return other_type;
    }
    if (uffd_query_features(&features) ||
        !(features & UFFD_FEATURE_GUEST_MEMFD)) {
        return "userfaultfd has no support for guest_memfd"
               " (UFFD_FEATURE_GUEST_MEMFD)";
    }
    if (pwrite(rb->fd, NULL, 0, 0)) {
        return "a guest_memfd that can't be written (GUEST_MEMFD_FLAG_WRITE)";
    }
    return NULL;
}

/* Pages that are to come must not have contents, whatever was done before. */
static int guest_memfd_prepare(PostcopyKvmBlock *b)
{
    unsigned long page = 0, end;

    while ((page = find_next_zero_bit(b->present, b->pages, page)) < b->pages) {
        end = find_next_bit(b->present, b->pages, page);
        if (fallocate(b->rb->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      b->rb->fd_offset + page * b->page_size,
                      (end - page) * b->page_size)) {
            return -errno;
        }
        page = end;
    }
    return 0;
}

static int guest_memfd_fill(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                            const void *from)
{
    ssize_t len = RETRY_ON_EINTR(pwrite(b->rb->fd, from, b->page_size,
                                        b->rb->fd_offset + offset));
    /* Only of more than one page could some remain. */
    int err = len < 0 ? errno : EIO;

    if (len == b->page_size) {
        return 0;
    }

    error_report("post-copy: %s %s+0x" RAM_ADDR_FMT ": %s",
                 err == ENOMEM ? "no memory for" : "can't write",
                 b->rb->idstr, offset, strerror(err));
    return -err;
}

static int guest_memfd_fill_zero(PostcopyKvmBlock *b, int uffd,
                                 ram_addr_t offset)
{
    return 0;
}

static const PostcopyKvmMethods guest_memfd_methods = {
    .name = "guest_memfd",
    .uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
    .refuse = guest_memfd_refuse,
    .prepare = guest_memfd_prepare,
    .fill = guest_memfd_fill,
    .fill_zero = guest_memfd_fill_zero,
    .map = file_map,
    .direct = true,
};

static const PostcopyKvmMethods *const all_methods[] = {
    &anonymous_methods, &memfd_methods, &hugetlb_split_methods,
    &hugetlb_methods, &guest_memfd_methods,
};
#else
static const PostcopyKvmMethods *const all_methods[] = { };
#endif /* CONFIG_LINUX */

static void postcopy_kvm_block_free(PostcopyKvmBlock *b)
{
    qemu_mutex_destroy(&b->run_lock);
    g_free(b->claimed);
    g_free(b->requested);
    g_free(b->filled);
    g_free(b->present);
    g_free(b->host_wanted);
    g_free(b->host_left);
    g_free(b);
}

static void postcopy_kvm_block_finish(PostcopyKvmBlock *b)
{
    if (b->methods->finish) {
        b->methods->finish(b);
    }
    postcopy_kvm_block_free(b);
}

static PostcopyKvmBlock *postcopy_kvm_block_new(RAMBlock *rb,
                                                const PostcopyKvmMethods *m)
{
    PostcopyKvmBlock *b = g_new0(PostcopyKvmBlock, 1);

    b->rb = rb;
    b->methods = m;
    b->page_size = m->split ? qemu_real_host_page_size() : rb->page_size;
    b->pages = rb->postcopy_length / b->page_size;
    b->per_host_page = rb->page_size / b->page_size;
    b->claimed = bitmap_new(b->pages);
    b->requested = bitmap_new(b->pages);
    b->filled = bitmap_new(b->pages);
    b->present = bitmap_new(b->pages);
    b->host_wanted = m->direct ? bitmap_new(b->pages / b->per_host_page) : NULL;
    b->host_left = m->split ? g_new0(uint32_t, b->pages / b->per_host_page)
                            : NULL;
    qemu_mutex_init(&b->run_lock);
    return b;
}

/* What precopy brought, and was not changed since, is in place. */
static void postcopy_kvm_block_received(PostcopyKvmBlock *b)
{
    unsigned long nr = b->page_size / qemu_target_page_size();
    unsigned long page;

    if (nr == 1) {
        bitmap_copy(b->present, b->rb->receivedmap, b->pages);
    }
    for (page = 0; nr > 1 && page < b->pages; page++) {
        unsigned long end = (page + 1) * nr;

        if (find_next_zero_bit(b->rb->receivedmap, end, page * nr) == end) {
            set_bit(page, b->present);
        }
    }
    bitmap_copy(b->filled, b->present, b->pages);
    bitmap_copy(b->claimed, b->present, b->pages);

    for (page = 0; b->host_left && page < b->pages; page += b->per_host_page) {
        b->host_left[page / b->per_host_page] =
            b->per_host_page -
            bitmap_count_one_with_offset(b->filled, page, b->per_host_page);
    }
}

/* Returns NULL, and *@why, if there are none. */
static const PostcopyKvmMethods *postcopy_kvm_methods(RAMBlock *rb,
                                                      const char **why)
{
    size_t i;

    *why = other_type;
    if (rb->page_size < qemu_target_page_size()) {
        *why = "pages smaller than the guest's";
        return NULL;
    }

    for (i = 0; i < ARRAY_SIZE(all_methods); i++) {
        *why = all_methods[i]->refuse(rb);
        if (!*why) {
            return all_methods[i];
        }
        if (*why != other_type) {
            break;
        }
    }
    return NULL;
}

const char *postcopy_kvm_block_refuse(RAMBlock *rb)
{
    const char *why;

    postcopy_kvm_methods(rb, &why);
    return why;
}

bool postcopy_kvm_block_needed(RAMBlock *rb)
{
    return qemu_ram_is_guest_memfd(rb) || rb->guest_memfd >= 0;
}

const char *postcopy_kvm_block_setup(RAMBlock *rb)
{
    const char *why;
    const PostcopyKvmMethods *m = postcopy_kvm_methods(rb, &why);
    PostcopyKvmBlock *b;

    if (!m) {
        return why;
    }

    b = postcopy_kvm_block_new(rb, m);
    postcopy_kvm_block_received(b);
    if (m->prepare && m->prepare(b)) {
        postcopy_kvm_block_free(b);
        return "the file can't be prepared";
    }

    qatomic_rcu_set(&rb->postcopy_kvm, b);
    trace_postcopy_kvm_block(rb->idstr, m->name);
    return NULL;
}

void postcopy_kvm_block_cleanup(RAMBlock *rb)
{
    PostcopyKvmBlock *b = rb->postcopy_kvm;

    if (b) {
        qatomic_rcu_set(&rb->postcopy_kvm, NULL);
        call_rcu(b, postcopy_kvm_block_finish, rcu);
    }
}
