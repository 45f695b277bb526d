/*
 * Post-copy migration with KVM Userfault: types of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_POSTCOPY_KVM_MEM_H
#define QEMU_MIGRATION_POSTCOPY_KVM_MEM_H

#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "system/ramblock.h"

typedef struct PostcopyKvmBlock PostcopyKvmBlock;

/*
 * What differs between types of memory.  Offsets and lengths are in bytes, and
 * multiples of the page size: the block's for @fill and @fill_zero, and the
 * RAMBlock's for @map.
 *
 *              anonymous          memfd, hugetlb             guest_memfd
 *   prepare    -                  a second mapping           punch holes
 *   fill       UFFDIO_COPY        write through that         pwrite()
 *   fill_zero  UFFDIO_ZEROPAGE    allocate a page, they      -, a hole reads
 *                                 come with zeros            as zeros
 *   map        -, @fill did it    UFFDIO_CONTINUE, also      UFFDIO_CONTINUE
 *                                 of ranges
 *   fill_again UFFDIO_ZEROPAGE    -                          -
 *   direct     no                 no                         yes
 *   split      no                 no                         no
 *   finish     -                  unmap                      -
 *
 * If KVM can look up pages that are there elsewhere (KVM_MEM_USERFAULT_ADDR),
 * it does so in the second mapping of hugetlb, which is direct and split then:
 * KVM has 4 KiB as soon as they are there, for vCPUs and for itself, and others
 * the huge page when all of it is.
 */
typedef struct PostcopyKvmMethods {
    const char *name;

    /* userfaultfd modes that host accesses need, beside MISSING */
    uint64_t uffd_mode;

    /*
     * Whether the methods can serve @rb.  Returns NULL, or why they cannot.
     */
    const char *(*refuse)(RAMBlock *rb);

    /*
     * Get ready to fill pages of @b.  Called with the BQL.  May be NULL.
     * Returns 0, or -errno.
     */
    int (*prepare)(PostcopyKvmBlock *b);

    /*
     * Give one page the contents @from, or zeros.  Called on any thread, for a
     * page at most once unless it fails.  Returns 0, or -errno.
     */
    int (*fill)(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                const void *from);
    int (*fill_zero)(PostcopyKvmBlock *b, int uffd, ram_addr_t offset);

    /*
     * Let host accesses see pages that are filled, and wake those who wait for
     * them in userfaultfd.  Called on any thread, also again for pages that
     * were mapped before.  NULL if @fill does that: its pages are not put
     * together to ranges then.  Returns 0, or -errno.
     */
    int (*map)(PostcopyKvmBlock *b, int uffd, ram_addr_t offset, size_t len);

    /*
     * Somebody waits in userfaultfd for a page that was filled: it came in the
     * meantime, or it was discarded.  Wakes them, and leaves a page that is
     * there alone.  NULL if @map does that.  Returns 0, or -errno.
     */
    int (*fill_again)(PostcopyKvmBlock *b, int uffd, ram_addr_t offset);

    /*
     * vCPUs do not need @map, as KVM takes pages straight from the file, or
     * from the second mapping.  It is done only for pages that somebody else
     * waits for, then.
     */
    bool direct;

    /*
     * Pages of the host's page size are asked for, filled and published, even
     * if the RAMBlock's are larger.  Needs @direct.  KVM looks up what is there
     * in the second mapping, also for itself.
     */
    bool split;

    /*
     * Undo @prepare.  Called by the RCU thread, when nobody uses @b.  May be
     * NULL.
     */
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

    /*
     * Bitmaps of @pages bits, one for each page of @page_size bytes, which is
     * the RAMBlock's unless @methods->split.  postcopy-kvm-page.c says what
     * they stand for.
     */
    size_t page_size;
    unsigned long pages;
    unsigned long *claimed;
    unsigned long *requested;
    unsigned long *filled;
    unsigned long *present;

    /*
     * How many of these are one of the RAMBlock's pages, and for each of those:
     * whether it is wanted by others than vCPUs, NULL unless @methods->direct;
     * and how many are not filled, NULL unless @methods->split
     */
    unsigned long per_host_page;
    unsigned long *host_wanted;
    uint32_t *host_left;

    /* Pages that are filled and wait for more, to be mapped at once */
    QemuMutex run_lock;
    unsigned long run_first;
    unsigned long run_pages;

    /*
     * memfd, hugetlb: the second mapping, which userfaultfd does not watch;
     * which of the RAMBlock's pages have memory; and the one after that with
     * the last page filled
     */
    uint8_t *alias;
    bool keep_alias;
    unsigned long *populated;
    unsigned long next;
};

/* Read bit @nr of @map.  Pairs with set_bit_atomic(), as an acquire. */
static inline bool bitmap_test_acquire(const unsigned long *map, long nr)
{
    return qatomic_load_acquire(&map[BIT_WORD(nr)]) & BIT_MASK(nr);
}

/*
 * The first bit of @map from @nr on that is set, or @size if there is none
 * below that.  Unlike find_next_bit(), for bits that change meanwhile.
 */
static inline unsigned long bitmap_find_next_acquire(const unsigned long *map,
                                                     unsigned long size,
                                                     unsigned long nr)
{
    while (nr < size) {
        unsigned long word = qatomic_load_acquire(&map[BIT_WORD(nr)]) &
                             BITMAP_FIRST_WORD_MASK(nr);

        if (word) {
            nr = ROUND_DOWN(nr, BITS_PER_LONG) + ctzl(word);
            break;
        }
        nr = ROUND_DOWN(nr, BITS_PER_LONG) + BITS_PER_LONG;
    }
    return MIN(nr, size);
}

/* The bits of @map, which has @size, from @nr on: as many as fit into a word */
static inline unsigned long bitmap_word_acquire(const unsigned long *map,
                                                unsigned long size,
                                                unsigned long nr)
{
    unsigned int shift = nr % BITS_PER_LONG;
    unsigned long word = qatomic_load_acquire(&map[BIT_WORD(nr)]) >> shift;

    if (shift && BIT_WORD(nr) + 1 < BITS_TO_LONGS(size)) {
        word |= qatomic_load_acquire(&map[BIT_WORD(nr) + 1]) <<
                (BITS_PER_LONG - shift);
    }
    return word;
}

/*
 * Set @nr bits of @map, from @first on.  Unlike bitmap_set_atomic(), which does
 * so to whole words with plain stores, for bits that others read meanwhile.
 */
static inline void bitmap_set_range_atomic(unsigned long *map,
                                           unsigned long first,
                                           unsigned long nr)
{
    unsigned long end = first + nr;

    while (first < end) {
        unsigned long next = MIN(ROUND_UP(first + 1, BITS_PER_LONG), end);
        unsigned long mask = BITMAP_FIRST_WORD_MASK(first) &
                             BITMAP_LAST_WORD_MASK(next);

        qatomic_or(&map[BIT_WORD(first)], mask);
        first = next;
    }
}

/* Set bit @nr of @map.  Returns whether it was set before.  A full barrier. */
static inline bool bitmap_test_and_set_one_atomic(unsigned long *map, long nr)
{
    return qatomic_fetch_or(&map[BIT_WORD(nr)], BIT_MASK(nr)) & BIT_MASK(nr);
}

/*
 * Whether a method can serve @rb.  Returns NULL, or why this type of memory has
 * to be left to plain userfaultfd.
 */
const char *postcopy_kvm_block_refuse(RAMBlock *rb);

/*
 * Whether plain userfaultfd can't serve @rb: vCPUs do not get its pages by way
 * of QEMU's mapping, and would see zeros.
 */
bool postcopy_kvm_block_needed(RAMBlock *rb);

/*
 * Serve @rb from now on.  Called with the BQL.  Returns NULL, or why this type
 * of memory has to be left to plain userfaultfd.
 */
const char *postcopy_kvm_block_setup(RAMBlock *rb);

/* Stop to serve @rb.  Does nothing if it isn't.  Called with the BQL. */
void postcopy_kvm_block_cleanup(RAMBlock *rb);

#endif
