/*
 * Post-copy migration with KVM Userfault: pages, and who waits for them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_POSTCOPY_KVM_PAGE_H
#define QEMU_MIGRATION_POSTCOPY_KVM_PAGE_H

#include "qemu/queue.h"
#include "migration.h"
#include "postcopy-kvm-mem.h"

/* Microseconds until something that failed for want of memory is tried again */
#define POSTCOPY_KVM_RETRY_US 100000

/*
 * Somebody who waits for a page, or did last.  In the list of the page's shard
 * until @ready, both of which change with the shard's lock.
 */
typedef struct PostcopyKvmWaiter {
    /* Only to be compared, the block may be gone */
    RAMBlock *rb;
    ram_addr_t offset;
    struct PostcopyKvmShard *shard;
    /* The page has arrived, or never will; set just before @wake is called */
    bool ready;
    /* Called on any thread, with the shard's lock; may free @w */
    void (*wake)(struct PostcopyKvmWaiter *w);
    void *opaque;
    QLIST_ENTRY(PostcopyKvmWaiter) next;
} PostcopyKvmWaiter;

/* Whether @w was woken.  Then nobody else uses it any more, but for @wake. */
static inline bool postcopy_kvm_ready(PostcopyKvmWaiter *w)
{
    /* Pairs with the store-release in postcopy_kvm_wake() */
    return qatomic_load_acquire(&w->ready);
}

/* Once for each migration.  Called with the BQL. */
void postcopy_kvm_pages_init(MigrationIncomingState *mis);

/* Whether vCPUs have to ask for the page at @offset, in bytes */
bool postcopy_kvm_missing(PostcopyKvmBlock *b, ram_addr_t offset);

/*
 * The same for @npages of the host's pages, from number @first of @b on: sets
 * the bits of @bitmap, which has @npages, that stand for those, and clears the
 * others.
 */
void postcopy_kvm_missing_range(PostcopyKvmBlock *b, uint64_t first,
                                uint64_t npages, unsigned long *bitmap);

/**
 * postcopy_kvm_wait_for: let @w wait for the page at @offset, in bytes
 *
 * @w: its @wake is set, and it waits for nothing
 * @asked: whether the source was asked, because nobody else had
 *
 * Returns: false if the page is filled; @w is in the list nevertheless, or was
 *          woken
 */
bool postcopy_kvm_wait_for(PostcopyKvmWaiter *w, PostcopyKvmBlock *b,
                           ram_addr_t offset, bool *asked);

/**
 * postcopy_kvm_wait_for_host: let @w wait until host accesses see a page
 *
 * @b: its methods are direct
 * @offset: of the page, in bytes
 *
 * Asks the source for what is missing of the RAMBlock's page.
 *
 * Returns: false if @w, which is in the list nevertheless, may never be woken:
 *          there is no memory for the page
 */
bool postcopy_kvm_wait_for_host(PostcopyKvmWaiter *w, PostcopyKvmBlock *b,
                                ram_addr_t offset);

/* Let @w wait no more.  Returns false if it was woken before. */
bool postcopy_kvm_unqueue(PostcopyKvmWaiter *w);

/**
 * postcopy_kvm_show_now: take the last steps for a page that is filled
 *
 * And for those that wait with it, unless somebody is at them.  Called on any
 * thread.  Returns: 0, or -errno
 */
int postcopy_kvm_show_now(PostcopyKvmBlock *b, unsigned long page);

/* Take the last steps for all pages that are filled and wait for more. */
void postcopy_kvm_show_rest(PostcopyKvmBlock *b);

/* Nobody may remain who waits for what will not come. */
void postcopy_kvm_release_waiters(void);

/* No page of @b will come any more: it is removed.  Called with the BQL. */
void postcopy_kvm_forget_block(PostcopyKvmBlock *b);

/* Fill in the counts of pages. */
void postcopy_kvm_pages_fill_info(PostcopyKvmInfo *info);

#endif
