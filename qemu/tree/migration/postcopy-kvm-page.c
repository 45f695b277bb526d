/*
 * Post-copy migration with KVM Userfault: pages, and who waits for them
 *
 * A page goes through these states, each kept in a bitmap of its RAMBlock:
 *
 *   requested   Somebody asked for it.  Set once per page, so that one request
 *               is in flight however many vCPUs wait.  Cleared by whoever
 *               sees that the page has arrived, to wake those who wait.
 *   claimed     Somebody fills it.  Set once per page; who comes second drops
 *               its copy, as the guest may have changed the page by then.
 *   filled      Its contents are in place.  If nobody waits for it, that may be
 *               all for a while: pages that come one after the other are
 *               mapped together.  Whoever needs one that is only filled takes
 *               the last step for it, and asks nobody.
 *   present     Host accesses see it, too.  After that its bits in KVM's
 *               bitmaps are cleared ("published"), never before: a vCPU that
 *               entered too early would fault again, in userfaultfd.
 *
 * If KVM takes pages straight from a file (PostcopyKvmMethods.direct), vCPUs do
 * not care what host accesses see: a page is published and present once it is
 * filled, and mapped for host accesses only if there are some:
 *
 *   host_wanted Somebody in userfaultfd waits for it, or will.
 *
 * With PostcopyKvmMethods.split, many pages are one for host accesses (a "host
 * page" here), which is mapped once all of them are filled.
 *
 * Bits of filled and present are never cleared, and those of claimed only if
 * filling fails.  Mapping and publishing a page that is filled can be done by
 * several threads at once, and again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "qemu/stats64.h"
#include "exec/target_page.h"
#include "system/kvm-userfault.h"
#include "postcopy-kvm.h"
#include "postcopy-kvm-page.h"
#include "ram.h"
#include "trace.h"

#define POSTCOPY_KVM_SHARDS 64

/* The most that is mapped at once.  Whoever needs one of them does not wait. */
#define POSTCOPY_KVM_RUN_PAGES 64

/* Those who wait for one of the pages whose number hashes to this. */
typedef struct PostcopyKvmShard {
    QemuMutex lock;
    QLIST_HEAD(, PostcopyKvmWaiter) waiters;
} PostcopyKvmShard;

static struct {
    MigrationIncomingState *mis;
    PostcopyKvmShard shards[POSTCOPY_KVM_SHARDS];
    Stat64 placed;
    Stat64 maps;
} pages;

void postcopy_kvm_pages_init(MigrationIncomingState *mis)
{
    unsigned int i;

    stat64_init(&pages.placed, 0);
    stat64_init(&pages.maps, 0);
    if (pages.mis) {
        return;
    }

    pages.mis = mis;
    for (i = 0; i < POSTCOPY_KVM_SHARDS; i++) {
        qemu_mutex_init(&pages.shards[i].lock);
        QLIST_INIT(&pages.shards[i].waiters);
    }
}

/*
 * Added to the offset of a page, to wait until host accesses see its host page.
 * No page begins there.
 */
#define POSTCOPY_KVM_HOST 1

static PostcopyKvmShard *postcopy_kvm_shard(PostcopyKvmBlock *b,
                                            ram_addr_t offset)
{
    return &pages.shards[(offset / b->page_size) % POSTCOPY_KVM_SHARDS];
}

/*
 * Called with the lock of the shard that @w is in.  Whoever sees that @w is
 * ready has it back, and may put it in the list of another shard.
 */
static void postcopy_kvm_wake(PostcopyKvmWaiter *w)
{
    QLIST_REMOVE(w, next);
    /* Pairs with the load-acquire in postcopy_kvm_ready() */
    qatomic_store_release(&w->ready, true);
    w->wake(w);
}

static void postcopy_kvm_wake_all(PostcopyKvmBlock *b, ram_addr_t offset)
{
    PostcopyKvmShard *shard = postcopy_kvm_shard(b, offset);
    PostcopyKvmWaiter *w, *next;

    QEMU_LOCK_GUARD(&shard->lock);
    QLIST_FOREACH_SAFE(w, &shard->waiters, next, next) {
        if (w->rb == b->rb && w->offset == offset) {
            postcopy_kvm_wake(w);
        }
    }
}

/* Nobody has to wait for the page any more, or has to want it again. */
static void postcopy_kvm_forget_request(PostcopyKvmBlock *b, unsigned long page)
{
    if (bitmap_test_and_clear_atomic(b->requested, page, 1)) {
        postcopy_kvm_wake_all(b, page * b->page_size);
        qatomic_dec(&pages.mis->page_requested_count);
    }
}

/* Let vCPUs see pages that are filled. */
static void postcopy_kvm_publish(PostcopyKvmBlock *b, unsigned long first,
                                 unsigned long nr)
{
    bitmap_set_range_atomic(b->present, first, nr);
    kvm_userfault_publish(b->rb, first * b->page_size, nr * b->page_size);
}

/*
 * Note that the page is needed, and ask for it unless somebody did.
 *
 * Pairs with postcopy_kvm_place().  There, filled is set before requested
 * is looked at, and here the other way round, so that at least one of the two
 * sees what the other did: no page arrives without its waiters being told.
 * Whoever takes requested away tells all of them, as others may have come
 * first, and waited before the page was filled.
 *
 * Returns false if the page is filled.  If true, *@ask says whether the caller
 * has to send a request.
 */
static bool postcopy_kvm_want(PostcopyKvmBlock *b, unsigned long page,
                              bool *ask)
{
    /* First, so that it is never less than what is requested. */
    qatomic_inc(&pages.mis->page_requested_count);
    *ask = !bitmap_test_and_set_one_atomic(b->requested, page);
    if (!*ask) {
        qatomic_dec(&pages.mis->page_requested_count);
    }

    /* Pairs with smp_mb() in postcopy_kvm_place() */
    smp_mb();
    if (!bitmap_test_acquire(b->filled, page)) {
        return true;
    }

    /* Who filled it may not have come to that, and others may wait for it. */
    if (b->methods->direct) {
        postcopy_kvm_publish(b, page, 1);
    }
    postcopy_kvm_forget_request(b, page);
    return false;
}

static int postcopy_kvm_place(PostcopyKvmBlock *b, ram_addr_t offset,
                              const void *from, bool arrived);

/*
 * There is nothing to wait for on the source, it has no such page.  If there is
 * no memory for it, whoever needs it wants it again, after a while.
 *
 * Returns 0, or -errno
 */
static int postcopy_kvm_place_discarded(PostcopyKvmBlock *b, ram_addr_t offset)
{
    int ret = postcopy_kvm_place(b, offset, NULL, false);

    if (ret) {
        g_usleep(POSTCOPY_KVM_RETRY_US);
        postcopy_kvm_forget_request(b, offset / b->page_size);
    }
    return ret;
}

/*
 * Let host accesses see pages that are filled: @nr host pages, from number
 * @first on.  Returns 0, or -errno.
 */
static int postcopy_kvm_map(PostcopyKvmBlock *b, unsigned long first,
                            unsigned long nr)
{
    size_t size = b->page_size * b->per_host_page;
    int ret = 0;

    if (b->methods->map) {
        ret = b->methods->map(b, pages.mis->userfault_fd, first * size,
                              nr * size);
        stat64_add(&pages.maps, !ret);
    }
    return ret;
}

/* Let everybody see pages that are filled.  Returns 0, or -errno. */
static int postcopy_kvm_show(PostcopyKvmBlock *b, unsigned long first,
                             unsigned long nr)
{
    int ret = postcopy_kvm_map(b, first, nr);

    if (!ret) {
        postcopy_kvm_publish(b, first, nr);
    }
    return ret;
}

/* Whether all pages of a host page are filled */
static bool postcopy_kvm_host_page_filled(PostcopyKvmBlock *b,
                                          unsigned long host_page)
{
    return b->host_left ? !qatomic_load_acquire(&b->host_left[host_page])
                        : bitmap_test_acquire(b->filled, host_page);
}

/*
 * Let host accesses see a host page if all of it is filled and somebody wants
 * it.  Whoever wants it looks as well, after they have said so, and whoever
 * fills the last page of it looks after that: one of them sees both.
 *
 * Returns 0, or -errno
 */
static int postcopy_kvm_map_wanted(PostcopyKvmBlock *b, unsigned long host_page)
{
    int ret;

    if (!bitmap_test_acquire(b->host_wanted, host_page) ||
        !postcopy_kvm_host_page_filled(b, host_page)) {
        return 0;
    }

    ret = postcopy_kvm_map(b, host_page, 1);
    if (!ret) {
        postcopy_kvm_wake_all(b, host_page * b->per_host_page * b->page_size +
                                 POSTCOPY_KVM_HOST);
    }
    return ret;
}

/* The same as postcopy_kvm_show() for one page that KVM finds by itself. */
static int postcopy_kvm_show_direct(PostcopyKvmBlock *b, unsigned long page)
{
    postcopy_kvm_publish(b, page, 1);
    return postcopy_kvm_map_wanted(b, page / b->per_host_page);
}

/* Called with b->run_lock.  Pages remain filled if it fails. */
static int postcopy_kvm_show_run_locked(PostcopyKvmBlock *b)
{
    unsigned long nr = b->run_pages;

    b->run_pages = 0;
    return nr ? postcopy_kvm_show(b, b->run_first, nr) : 0;
}

/* Nobody waits for this page: show it with those that come after it. */
static int postcopy_kvm_show_later(PostcopyKvmBlock *b, unsigned long page)
{
    int ret = 0;

    QEMU_LOCK_GUARD(&b->run_lock);
    if (page != b->run_first + b->run_pages) {
        ret = postcopy_kvm_show_run_locked(b);
    }
    if (!b->run_pages) {
        b->run_first = page;
    }
    b->run_pages++;
    if (!ret && b->run_pages == POSTCOPY_KVM_RUN_PAGES) {
        ret = postcopy_kvm_show_run_locked(b);
    }
    return ret;
}

int postcopy_kvm_show_now(PostcopyKvmBlock *b, unsigned long page)
{
    int ret = 0;

    if (b->methods->direct) {
        return postcopy_kvm_show_direct(b, page);
    }

    if (!qemu_mutex_trylock(&b->run_lock)) {
        bool in_run = page - b->run_first < b->run_pages;

        if (in_run) {
            ret = postcopy_kvm_show_run_locked(b);
        }
        qemu_mutex_unlock(&b->run_lock);
        if (in_run) {
            return ret;
        }
    }
    return postcopy_kvm_show(b, page, 1);
}

/*
 * Host pages that nobody has wanted so far will be: KVM is about to look them
 * up for vCPUs there.
 */
static void postcopy_kvm_map_rest(PostcopyKvmBlock *b)
{
    unsigned long nr = b->pages / b->per_host_page;
    unsigned long first = 0, end;

    while (first < nr) {
        for (end = first; end < nr && postcopy_kvm_host_page_filled(b, end);) {
            end++;
        }
        if (end > first) {
            postcopy_kvm_map(b, first, end - first);
        }
        first = end + 1;
    }
}

void postcopy_kvm_show_rest(PostcopyKvmBlock *b)
{
    if (b->methods->split) {
        postcopy_kvm_map_rest(b);
        return;
    }

    QEMU_LOCK_GUARD(&b->run_lock);
    postcopy_kvm_show_run_locked(b);
}

static int postcopy_kvm_fill(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                             const void *from)
{
    return from ? b->methods->fill(b, uffd, offset, from)
                : b->methods->fill_zero(b, uffd, offset);
}

/*
 * Fill a page, show it, and wake those who wait for it.  What has @arrived is
 * noted, for a recovery, in what may be freed once nothing else can arrive.
 */
static int postcopy_kvm_place(PostcopyKvmBlock *b, ram_addr_t offset,
                              const void *from, bool arrived)
{
    unsigned long page = offset / b->page_size;
    RAMBlock *rb = b->rb;
    bool requested;
    int ret;

    if (bitmap_test_and_set_one_atomic(b->claimed, page)) {
        trace_postcopy_kvm_duplicate(rb->idstr, offset);
        return 0;
    }

    ret = postcopy_kvm_fill(b, pages.mis->userfault_fd, offset, from);
    if (ret) {
        clear_bit_atomic(page, b->claimed);
        return ret;
    }

    stat64_add(&pages.placed, 1);
    if (arrived) {
        ramblock_recv_bitmap_set_range(rb, rb->host + offset,
                                       b->page_size / qemu_target_page_size());
    }
    trace_postcopy_kvm_place(rb->idstr, offset, !from);
    set_bit_atomic(page, b->filled);
    if (b->host_left) {
        qatomic_dec(&b->host_left[page / b->per_host_page]);
    }

    /* Pairs with those in postcopy_kvm_want() and _show_host_page() */
    smp_mb();
    requested = bitmap_test_acquire(b->requested, page) &&
                bitmap_test_and_clear_atomic(b->requested, page, 1);

    if (b->methods->direct) {
        ret = postcopy_kvm_show_direct(b, page);
    } else if (requested || !b->methods->map) {
        ret = postcopy_kvm_show(b, page, 1);
    } else {
        ret = postcopy_kvm_show_later(b, page);
    }
    if (!requested) {
        return ret;
    }

    postcopy_kvm_wake_all(b, offset);
    qatomic_dec(&pages.mis->page_requested_count);
    return ret;
}

size_t postcopy_kvm_place_size(RAMBlock *rb)
{
    PostcopyKvmBlock *b = qatomic_read(&rb->postcopy_kvm);

    return b ? b->page_size : rb->page_size;
}

int postcopy_kvm_place_page(RAMBlock *rb, void *host, const void *from)
{
    /* That of pages for which userfaultfd has no zeros of its own */
    if (from == pages.mis->postcopy_tmp_zero_page) {
        from = NULL;
    }
    return postcopy_kvm_place(rb->postcopy_kvm,
                              qemu_ram_block_host_offset(rb, host), from, true);
}

/*
 * Let host accesses see the host page at @offset, or have what is missing of it
 * filled before.  Returns 0, or -errno if it is to be tried again.
 */
static int postcopy_kvm_show_host_page(PostcopyKvmBlock *b, ram_addr_t offset)
{
    unsigned long first = offset / b->page_size, page;
    bool missing = false, ask = false;

    if (b->methods->direct) {
        set_bit_atomic(first / b->per_host_page, b->host_wanted);
        /* Pairs with smp_mb() in postcopy_kvm_place() */
        smp_mb__after_rmw();
    }

    for (page = first; page < first + b->per_host_page; page++) {
        bool first_to_want;

        if (bitmap_test_acquire(b->filled, page) ||
            !postcopy_kvm_want(b, page, &first_to_want)) {
            continue;
        }
        if (!first_to_want || !ramblock_page_is_discarded(b->rb, offset)) {
            missing = true;
            ask |= first_to_want;
        } else if (postcopy_kvm_place_discarded(b, page * b->page_size)) {
            return -ENOMEM;
        }
    }

    if (ask) {
        /* If it can't be sent, it will be after the recovery. */
        migrate_send_rp_message_req_pages(pages.mis, b->rb, offset);
    }
    if (missing) {
        return 0;
    }
    if (b->methods->fill_again) {
        return b->methods->fill_again(b, pages.mis->userfault_fd, offset);
    }
    /* Not mapped yet, or e.g. swapped out after it was */
    return postcopy_kvm_show_now(b, first);
}

void postcopy_kvm_request_page(MigrationIncomingState *mis, RAMBlock *rb,
                               ram_addr_t offset)
{
    /*
     * If there is no memory, no recovery follows, and nobody else does what is
     * left to do.
     */
    while (postcopy_kvm_show_host_page(rb->postcopy_kvm,
                                       offset) == -ENOMEM &&
           !qatomic_read(&mis->fault_thread_quit)) {
        g_usleep(POSTCOPY_KVM_RETRY_US);
    }
}

/*
 * Pages that were filled, but could not be mapped, have arrived: they don't
 * come again, and nobody asks for them.  Returns 0, or -errno.
 */
static int postcopy_kvm_show_again(PostcopyKvmBlock *b)
{
    unsigned long *shown = b->methods->direct ? b->host_wanted : b->filled;
    unsigned long nr = b->pages / b->per_host_page;
    unsigned long page;
    int ret = 0;

    for (page = bitmap_find_next_acquire(shown, nr, 0);
         !ret && page < nr;
         page = bitmap_find_next_acquire(shown, nr, page + 1)) {
        if (b->methods->direct) {
            ret = postcopy_kvm_map_wanted(b, page);
        } else if (!bitmap_test_acquire(b->present, page)) {
            ret = postcopy_kvm_show_now(b, page);
        }
    }
    return ret;
}

/*
 * Ask for a page that was asked for before, and for all of its host page if
 * that is wanted.  Returns the first page that it is not for.
 */
static unsigned long postcopy_kvm_ask_again(PostcopyKvmBlock *b,
                                            unsigned long page)
{
    unsigned long nr = b->per_host_page;

    if (nr > 1 && bitmap_test_acquire(b->host_wanted, page / nr)) {
        page = ROUND_DOWN(page, nr);
        migrate_send_rp_message_req_pages(pages.mis, b->rb,
                                          page * b->page_size);
        return page + nr;
    }
    migrate_send_rp_message_req_part(pages.mis, b->rb, page * b->page_size);
    return page + 1;
}

int postcopy_kvm_resume(MigrationIncomingState *mis)
{
    RAMBlock *rb;
    int ret = 0;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        PostcopyKvmBlock *b = rb->postcopy_kvm;
        unsigned long page = 0;

        if (!b) {
            continue;
        }
        while ((page = bitmap_find_next_acquire(b->requested, b->pages,
                                                page)) < b->pages) {
            page = postcopy_kvm_ask_again(b, page);
        }
        if (!ret) {
            ret = postcopy_kvm_show_again(b);
        }
    }
    return ret;
}

bool postcopy_kvm_missing(PostcopyKvmBlock *b, ram_addr_t offset)
{
    unsigned long page = offset / b->page_size;

    /* What is beyond the source's RAM will not arrive. */
    return page < b->pages && !bitmap_test_acquire(b->present, page);
}

void postcopy_kvm_missing_range(PostcopyKvmBlock *b, uint64_t first,
                                uint64_t npages, unsigned long *bitmap)
{
    uint64_t nr = b->page_size / qemu_real_host_page_size();
    uint64_t all = b->pages * nr;
    uint64_t i, end;

    bitmap_zero(bitmap, npages);
    /* What is beyond the source's RAM will not arrive. */
    npages = first < all ? MIN(npages, all - first) : 0;

    /* The guest stands still meanwhile: a word at a time, if that can be. */
    for (i = 0; nr == 1 && i < npages; i += BITS_PER_LONG) {
        bitmap[BIT_WORD(i)] = ~bitmap_word_acquire(b->present, b->pages,
                                                   first + i);
    }
    if (nr == 1 && npages % BITS_PER_LONG) {
        bitmap[BIT_WORD(npages)] &= BITMAP_LAST_WORD_MASK(npages);
    }
    for (i = 0; nr > 1 && i < npages; i = end) {
        end = MIN(ROUND_UP(first + i + 1, nr) - first, npages);
        if (!bitmap_test_acquire(b->present, (first + i) / nr)) {
            bitmap_set(bitmap, i, end - i);
        }
    }
}

/* Whether some, but not all, of a host page of @b has come. */
static bool postcopy_kvm_block_incomplete(PostcopyKvmBlock *b)
{
    unsigned long nr = b->pages / b->per_host_page;
    unsigned long i;

    for (i = 0; b->host_left && i < nr; i++) {
        uint32_t left = qatomic_read(&b->host_left[i]);

        /* Of what is discarded, parts are filled as they are needed. */
        if (left && left < b->per_host_page &&
            !ramblock_page_is_discarded(b->rb, i * b->rb->page_size)) {
            return true;
        }
    }
    return false;
}

bool postcopy_kvm_incomplete(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        PostcopyKvmBlock *b = qatomic_rcu_read(&rb->postcopy_kvm);

        if (b && postcopy_kvm_block_incomplete(b)) {
            return true;
        }
    }
    return false;
}

static void postcopy_kvm_queue(PostcopyKvmWaiter *w, PostcopyKvmBlock *b,
                               ram_addr_t offset)
{
    PostcopyKvmShard *shard = postcopy_kvm_shard(b, offset);

    w->rb = b->rb;
    w->offset = offset;
    w->shard = shard;
    qatomic_set(&w->ready, false);

    QEMU_LOCK_GUARD(&shard->lock);
    QLIST_INSERT_HEAD(&shard->waiters, w, next);
}

bool postcopy_kvm_unqueue(PostcopyKvmWaiter *w)
{
    QEMU_LOCK_GUARD(&w->shard->lock);
    if (w->ready) {
        return false;
    }
    QLIST_REMOVE(w, next);
    w->ready = true;
    return true;
}

bool postcopy_kvm_wait_for(PostcopyKvmWaiter *w, PostcopyKvmBlock *b,
                           ram_addr_t offset, bool *asked)
{
    RAMBlock *rb = b->rb;
    ram_addr_t host_page = ROUND_DOWN(offset, rb->page_size);

    /* First, as whoever sees that the page arrives looks for waiters once. */
    postcopy_kvm_queue(w, b, offset);

    if (!postcopy_kvm_want(b, offset / b->page_size, asked)) {
        return false;
    }
    if (!*asked) {
        return true;
    }
    /* What is discarded, and what is not, is so by whole host pages. */
    if (ramblock_page_is_discarded(rb, host_page)) {
        postcopy_kvm_place_discarded(b, offset);
    } else {
        /* If it can't be sent, it will be after the recovery. */
        migrate_send_rp_message_req_part(pages.mis, rb, offset);
    }
    return true;
}

bool postcopy_kvm_wait_for_host(PostcopyKvmWaiter *w, PostcopyKvmBlock *b,
                                ram_addr_t offset)
{
    offset = ROUND_DOWN(offset, b->page_size * b->per_host_page);
    postcopy_kvm_queue(w, b, offset + POSTCOPY_KVM_HOST);
    return !postcopy_kvm_show_host_page(b, offset);
}

void postcopy_kvm_release_waiters(void)
{
    unsigned int i;

    for (i = 0; i < POSTCOPY_KVM_SHARDS; i++) {
        PostcopyKvmShard *shard = &pages.shards[i];

        QEMU_LOCK_GUARD(&shard->lock);
        while (!QLIST_EMPTY(&shard->waiters)) {
            postcopy_kvm_wake(QLIST_FIRST(&shard->waiters));
        }
    }
}

void postcopy_kvm_forget_block(PostcopyKvmBlock *b)
{
    unsigned long page = 0;

    while ((page = bitmap_find_next_acquire(b->requested, b->pages,
                                            page)) < b->pages) {
        postcopy_kvm_forget_request(b, page++);
    }
}

void postcopy_kvm_pages_fill_info(PostcopyKvmInfo *info)
{
    info->pages = stat64_get(&pages.placed);
    info->maps = stat64_get(&pages.maps);
}
