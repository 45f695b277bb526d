/*
 * Post-copy migration with KVM Userfault: types of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/mmap-alloc.h"
#include "exec/cpu-common.h"
#include "exec/target_page.h"
#include "migration.h"
#include "postcopy-kvm-mem.h"
#include "trace.h"

#ifdef CONFIG_LINUX
#include <sys/ioctl.h>
#include "qemu/userfaultfd.h"

/*
 * Shared memory of a memfd or a tmpfs file
 *
 * Pages are written through a second mapping, which nobody else uses.  That
 * puts them into the page cache, where KVM and host accesses still do not see
 * them: both go through QEMU's own mapping, which is registered for MINOR
 * faults.  UFFDIO_CONTINUE maps them there.  MISSING is registered as well:
 * without it, a page that never arrived would appear as zeros.
 */

static const char *memfd_refuse(RAMBlock *rb)
{
    uint64_t features;

    if (rb->fd < 0) {
        return "not backed by a file";
    }
    if (!qemu_ram_is_shared(rb)) {
        return "not shared";
    }
    if (rb->guest_memfd >= 0) {
        return "has private memory";
    }
    if (qemu_fd_getfs(rb->fd) != QEMU_FS_TYPE_TMPFS) {
        return "not on tmpfs";
    }
    if (rb->page_size != qemu_real_host_page_size() ||
        rb->page_size != qemu_target_page_size()) {
        return "pages of another size than the host's or the guest's";
    }
    if (uffd_query_features(&features) ||
        !(features & UFFD_FEATURE_MINOR_SHMEM)) {
        return "userfaultfd has no minor faults for shared memory";
    }
    return NULL;
}

static int memfd_prepare(PostcopyKvmBlock *b)
{
    RAMBlock *rb = b->rb;
    void *alias = mmap(NULL, rb->postcopy_length, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_NORESERVE, rb->fd, rb->fd_offset);

    if (alias == MAP_FAILED) {
        return -errno;
    }
    b->alias = alias;
    return 0;
}

static int memfd_fill(PostcopyKvmBlock *b, ram_addr_t offset,
                      const void *from, size_t len)
{
    void *to = b->alias + offset;

    if (from) {
        memcpy(to, from, len);
    } else if (!buffer_is_zero(to, len)) {
        /* Reading brought the page into the page cache, all that it takes. */
        memset(to, 0, len);
    }
    return 0;
}

static int memfd_map(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                     size_t len)
{
    uintptr_t host = (uintptr_t)b->rb->host + offset;
    struct uffdio_continue cont = {
        .range = { .start = host, .len = len },
    };

    while (ioctl(uffd, UFFDIO_CONTINUE, &cont)) {
        switch (errno) {
        case EAGAIN:
            /* QEMU's address space is being changed, nothing was mapped. */
            cont.mapped = 0;
            break;
        case EFAULT:
            /* A hole, i.e. zeros that precopy did not bother to write */
            (void)*(volatile uint8_t *)(b->alias + offset);
            cont.mapped = 0;
            break;
        case EEXIST:
            /* Mapped before; somebody may wait all the same. */
            return uffd_wakeup(uffd, (void *)host, len);
        default:
            error_report("post-copy: UFFDIO_CONTINUE of %s+0x" RAM_ADDR_FMT
                         ": %s", b->rb->idstr, offset, strerror(errno));
            return -errno;
        }
    }
    return 0;
}

static void memfd_finish(PostcopyKvmBlock *b)
{
    munmap(b->alias, b->pages * qemu_target_page_size());
}

static const PostcopyKvmMethods memfd_methods = {
    .name = "memfd",
    .uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
    .refuse = memfd_refuse,
    .prepare = memfd_prepare,
    .fill = memfd_fill,
    .map = memfd_map,
    .finish = memfd_finish,
};

static const PostcopyKvmMethods *const all_methods[] = { &memfd_methods };
#else
static const PostcopyKvmMethods *const all_methods[] = { };
#endif /* CONFIG_LINUX */

static void postcopy_kvm_block_free(PostcopyKvmBlock *b)
{
    g_free(b->claimed);
    g_free(b->requested);
    g_free(b->present);
    g_free(b);
}

static void postcopy_kvm_block_finish(PostcopyKvmBlock *b)
{
    b->methods->finish(b);
    postcopy_kvm_block_free(b);
}

static PostcopyKvmBlock *postcopy_kvm_block_new(RAMBlock *rb,
                                                const PostcopyKvmMethods *m)
{
    PostcopyKvmBlock *b = g_new0(PostcopyKvmBlock, 1);

    b->rb = rb;
    b->methods = m;
    b->pages = rb->postcopy_length / qemu_target_page_size();
    b->claimed = bitmap_new(b->pages);
    b->requested = bitmap_new(b->pages);
    b->present = bitmap_new(b->pages);
    return b;
}

static const char *postcopy_kvm_block_try(RAMBlock *rb,
                                          const PostcopyKvmMethods *m)
{
    const char *why = m->refuse(rb);
    PostcopyKvmBlock *b;

    if (why) {
        return why;
    }

    b = postcopy_kvm_block_new(rb, m);
    if (m->prepare(b)) {
        postcopy_kvm_block_free(b);
        return "no second mapping to be had";
    }

    /* What precopy brought, and was not changed since */
    bitmap_copy(b->claimed, rb->receivedmap, b->pages);
    bitmap_copy(b->present, rb->receivedmap, b->pages);
    qatomic_rcu_set(&rb->postcopy_kvm, b);
    trace_postcopy_kvm_block(rb->idstr, m->name);
    return NULL;
}

const char *postcopy_kvm_block_setup(RAMBlock *rb)
{
    const char *why = "no method for this type of memory";
    size_t i;

    for (i = 0; why && i < ARRAY_SIZE(all_methods); i++) {
        why = postcopy_kvm_block_try(rb, all_methods[i]);
    }
    return why;
}

void postcopy_kvm_block_cleanup(RAMBlock *rb)
{
    PostcopyKvmBlock *b = rb->postcopy_kvm;

    if (b) {
        qatomic_rcu_set(&rb->postcopy_kvm, NULL);
        call_rcu(b, postcopy_kvm_block_finish, rcu);
    }
}
