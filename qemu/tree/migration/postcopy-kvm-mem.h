/*
 * Post-copy migration with KVM Userfault: types of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_POSTCOPY_KVM_MEM_H
#define QEMU_MIGRATION_POSTCOPY_KVM_MEM_H

#include "qemu/bitops.h"
#include "qemu/rcu.h"
#include "system/ramblock.h"

typedef struct PostcopyKvmBlock PostcopyKvmBlock;

/* What differs between types of memory.  Offsets and lengths are in bytes. */
typedef struct PostcopyKvmMethods {
    const char *name;

    /* userfaultfd modes that host accesses need, beside MISSING */
    uint64_t uffd_mode;

    /*
     * Whether the methods can serve @rb.  Returns NULL, or why they cannot.
     */
    const char *(*refuse)(RAMBlock *rb);

    /*
     * Get ready to fill pages of @b.  Called with the BQL.  Returns 0, or
     * -errno.
     */
    int (*prepare)(PostcopyKvmBlock *b);

    /*
     * Give the pages from @offset on the contents @from, or zeros if @from is
     * NULL, in a way that nobody sees them yet.  Called on any thread, for
     * a page at most once unless it fails.  Returns 0, or -errno.
     */
    int (*fill)(PostcopyKvmBlock *b, ram_addr_t offset, const void *from,
                size_t len);

    /*
     * Let host accesses see the pages, which are filled, and wake those who
     * wait for them in userfaultfd.  Called on any thread, also again for
     * pages that were mapped before.  Returns 0, or -errno.
     */
    int (*map)(PostcopyKvmBlock *b, int uffd, ram_addr_t offset, size_t len);

    /* Undo @prepare.  Called by the RCU thread, when nobody uses @b. */
    void (*finish)(PostcopyKvmBlock *b);
} PostcopyKvmMethods;

/*
 * A RAMBlock that is served.  RAMBlock.postcopy_kvm points to it; changes of
 * that are made with the BQL.  Readers that do not hold it use RCU.
 */
struct PostcopyKvmBlock {
    struct rcu_head rcu;
    RAMBlock *rb;
    const PostcopyKvmMethods *methods;

    /* Bitmaps of @pages bits.  postcopy-kvm.c says what they stand for. */
    unsigned long pages;
    unsigned long *claimed;
    unsigned long *requested;
    unsigned long *present;

    /* memfd: the second mapping, which userfaultfd does not watch */
    uint8_t *alias;
};

/* Pairs with set_bit_atomic(): what was filled is seen, too. */
static inline bool postcopy_kvm_block_present(PostcopyKvmBlock *b,
                                              unsigned long page)
{
    return qatomic_load_acquire(&b->present[BIT_WORD(page)]) & BIT_MASK(page);
}

/* Set bit @nr of @map.  Returns whether it was set before.  A full barrier. */
static inline bool bitmap_test_and_set_one_atomic(unsigned long *map, long nr)
{
    return qatomic_fetch_or(&map[BIT_WORD(nr)], BIT_MASK(nr)) & BIT_MASK(nr);
}

/*
 * Serve @rb from now on.  Called with the BQL.  Returns NULL, or why this type
 * of memory has to be left to plain userfaultfd.
 */
const char *postcopy_kvm_block_setup(RAMBlock *rb);

/* Stop to serve @rb.  Does nothing if it isn't.  Called with the BQL. */
void postcopy_kvm_block_cleanup(RAMBlock *rb);

#endif
