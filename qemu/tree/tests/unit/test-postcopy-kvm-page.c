/*
 * Stress test for pages of post-copy migration with KVM Userfault
 *
 * Threads in the place of vCPUs, of the fault thread, and of the one that reads
 * the stream want and place the same pages at the same time.  Whatever the
 * order, everybody who waits has to be woken, a page is filled and asked for
 * once, and is not published before it is filled.  A huge page is mapped when
 * all of it is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "exec/page-vary.h"
#include "exec/ramlist.h"
#include "system/kvm-userfault.h"
#include "../../migration/migration.h"
#include "../../migration/ram.h"
#include "../../migration/postcopy-kvm.h"
#include "../../migration/postcopy-kvm-page.h"

#define PAGE_SIZE 4096
#define PAGES 256
/* Of a huge page */
#define SPLIT 8
#define VCPUS 3
#define ROUNDS 1000

/* A page that has not come by then never will. */
#define LOST_MS 20000

typedef struct Vcpu {
    PostcopyKvmWaiter waiter;
    QemuSemaphore woken;
    unsigned int seed;
} Vcpu;

static MigrationIncomingState mis;
static PostcopyKvmBlock block;
static RAMBlock ram;

static int fills[PAGES];
static int asks[PAGES];
static int maps[PAGES];
static bool published[PAGES];

/* Pages that the source sends, in that order, and how many there are */
static int queue[PAGES];
static int queued;
static unsigned long sent[BITS_TO_LONGS(PAGES)];

/* The thread that reads the stream, where mapping may fail */
static __thread unsigned int *stream_seed;
static __thread bool resuming;
/* What is asked for when it resumes: offsets, with one more for parts */
static GArray *asked_again;

/* In each round, all begin at once. */
static int round_nr;
static int at_work;

/* What postcopy-kvm-page.c has from elsewhere */

const TargetPageBits target_page = {
    .decided = true,
    .bits = 12,
    .mask = -PAGE_SIZE,
};

RAMList ram_list;

static void note_asked_again(ram_addr_t offset)
{
    if (asked_again) {
        g_array_append_val(asked_again, offset);
    }
}

static void send_pages(unsigned long page, unsigned long end)
{
    for (; page < end; page++) {
        if (!bitmap_test_and_set_one_atomic(sent, page)) {
            qatomic_set(&queue[qatomic_fetch_inc(&queued)], page + 1);
        }
    }
}

int migrate_send_rp_message_req_pages(MigrationIncomingState *m, RAMBlock *rb,
                                      ram_addr_t start)
{
    unsigned long page = start / PAGE_SIZE;

    /* It is still in the queue here. */
    if (resuming) {
        note_asked_again(start);
        return 0;
    }
    qatomic_inc(&asks[page]);
    send_pages(page, ROUND_UP(page + 1, rb->page_size / PAGE_SIZE));
    return 0;
}

/* Some sources go on to the end of the huge page. */
int migrate_send_rp_message_req_part(MigrationIncomingState *m, RAMBlock *rb,
                                     ram_addr_t start)
{
    unsigned long page = start / PAGE_SIZE;

    if (resuming) {
        note_asked_again(start + 1);
        return 0;
    }
    if (round_nr % 2) {
        return migrate_send_rp_message_req_pages(m, rb, start);
    }
    qatomic_inc(&asks[page]);
    send_pages(page, page + 1);
    return 0;
}

static ram_addr_t discarded = -1;

bool ramblock_page_is_discarded(RAMBlock *rb, ram_addr_t start)
{
    /* It looks at as much as a page of the RAMBlock. */
    g_assert_true(QEMU_IS_ALIGNED(start, rb->page_size));
    return start == discarded;
}

static size_t received;

void ramblock_recv_bitmap_set_range(RAMBlock *rb, void *host_addr, size_t nr)
{
    qatomic_add(&received, nr);
}

ram_addr_t qemu_ram_block_host_offset(RAMBlock *rb, void *host)
{
    return (uint8_t *)host - rb->host;
}

void kvm_userfault_publish(RAMBlock *rb, ram_addr_t offset, size_t len)
{
    unsigned long page;

    for (page = offset / PAGE_SIZE; page < (offset + len) / PAGE_SIZE; page++) {
        g_assert_cmpint(qatomic_read(&fills[page]), ==, 1);
        if (block.methods->map && !block.methods->direct) {
            g_assert_cmpint(qatomic_read(&maps[page]), >, 0);
        }
        qatomic_set(&published[page], true);
    }
}

/* Methods of some types of memory */

static int fill(PostcopyKvmBlock *b, int uffd, ram_addr_t offset,
                const void *from)
{
    qatomic_inc(&fills[offset / PAGE_SIZE]);
    return 0;
}

static int fill_zero(PostcopyKvmBlock *b, int uffd, ram_addr_t offset)
{
    return fill(b, uffd, offset, NULL);
}

static int map(PostcopyKvmBlock *b, int uffd, ram_addr_t offset, size_t len)
{
    unsigned long page;

    if (stream_seed && rand_r(stream_seed) % 32 == 0) {
        return -ENOMEM;
    }
    for (page = offset / PAGE_SIZE; page < (offset + len) / PAGE_SIZE; page++) {
        g_assert_cmpint(qatomic_read(&fills[page]), ==, 1);
        qatomic_inc(&maps[page]);
    }
    return 0;
}

static int fills_again;

static int fill_again(PostcopyKvmBlock *b, int uffd, ram_addr_t offset)
{
    fills_again++;
    return 0;
}

static const PostcopyKvmMethods all_methods[] = {
    { "filled and mapped at once", .fill = fill, .fill_zero = fill_zero },
    { "mapped in ranges", .fill = fill, .fill_zero = fill_zero, .map = map },
    { "taken from the file", .fill = fill, .fill_zero = fill_zero, .map = map,
      .direct = true },
    { "parts of huge pages", .fill = fill, .fill_zero = fill_zero, .map = map,
      .direct = true, .split = true },
};

static void wake_vcpu(PostcopyKvmWaiter *w)
{
    qemu_sem_post(&container_of(w, Vcpu, waiter)->woken);
}

/* As a vCPU does: exit, wait, and enter again until the page is published. */
static void vcpu_need(Vcpu *v, unsigned long page)
{
    ram_addr_t offset = page * PAGE_SIZE;

    while (!qatomic_read(&published[page])) {
        bool asked;

        if (bitmap_test_acquire(block.filled, page)) {
            postcopy_kvm_show_now(&block, page);
            continue;
        }
        if (!postcopy_kvm_wait_for(&v->waiter, &block, offset, &asked)) {
            if (!postcopy_kvm_unqueue(&v->waiter)) {
                qemu_sem_wait(&v->woken);
            }
            continue;
        }
        if (qemu_sem_timedwait(&v->woken, LOST_MS)) {
            g_error("nobody has woken the waiter for page %lu: filled %d,"
                    " requested %d", page, test_bit(page, block.filled),
                    test_bit(page, block.requested));
        }
        /* The guest may start after that, and KVM itself can't exit again. */
        if (block.methods->direct) {
            g_assert_true(qatomic_read(&published[page]));
        }
    }
}

/* Wait until the round @nr begins.  Spins, so that all begin at once. */
static void begin(int nr)
{
    while (qatomic_load_acquire(&round_nr) != nr) {
        g_thread_yield();
    }
}

static void *vcpu_thread(void *opaque)
{
    Vcpu *v = opaque;
    int nr, i;

    rcu_register_thread();
    for (nr = 1; nr <= ROUNDS; nr++) {
        begin(nr);
        /* Mostly the same pages as others, at about the same time */
        for (i = 0; i < PAGES; i++) {
            vcpu_need(v, rand_r(&v->seed) % 8 ? i :
                         rand_r(&v->seed) % PAGES);
        }
        qatomic_dec(&at_work);
    }
    rcu_unregister_thread();
    return NULL;
}

/*
 * A host access: userfaultfd tells of it once, or often if many threads have
 * the same fault.  They all wait until the page is mapped.
 */
static void host_need(unsigned long page, bool often)
{
    int64_t end = g_get_monotonic_time() + LOST_MS * 1000;
    bool told = false;

    while (!(block.methods->map ? qatomic_read(&maps[page]) > 0
                                : qatomic_read(&published[page]))) {
        if (!told || often) {
            ram_addr_t offset = ROUND_DOWN(page * PAGE_SIZE, ram.page_size);

            postcopy_kvm_request_page(&mis, &ram, offset);
            told = true;
        }
        if (g_get_monotonic_time() > end) {
            g_error("nobody has mapped page %lu: filled %d, requested %d", page,
                    test_bit(page, block.filled),
                    test_bit(page, block.requested));
        }
    }
}

/* The start of the guest waits for a page that KVM itself needs. */
static void start_need(Vcpu *v, unsigned long page)
{
    g_assert_true(postcopy_kvm_wait_for_host(&v->waiter, &block,
                                             page * PAGE_SIZE));
    if (qemu_sem_timedwait(&v->woken, LOST_MS)) {
        g_error("nobody has told that page %lu is mapped: %d of its huge page"
                " left", page, block.host_left ? block.host_left[page / SPLIT]
                                               : 0);
    }
    g_assert_cmpint(qatomic_read(&maps[page]), >, 0);
}

static void *fault_thread(void *opaque)
{
    Vcpu v = { .waiter.wake = wake_vcpu };
    int nr, i;

    rcu_register_thread();
    qemu_sem_init(&v.woken, 0);
    for (nr = 1; nr <= ROUNDS; nr++) {
        begin(nr);
        for (i = 0; i < PAGES; i++) {
            if (block.methods->direct && i % 3 == 0) {
                start_need(&v, i);
            } else {
                host_need(i, i % 2);
            }
        }
        qatomic_dec(&at_work);
    }
    qemu_sem_destroy(&v.woken);
    rcu_unregister_thread();
    return NULL;
}

/* Post-copy pauses, and is recovered, until the pages can be mapped. */
static void recover(void)
{
    int ret;

    resuming = true;
    do {
        ret = postcopy_kvm_resume(&mis);
    } while (ret);
    resuming = false;
}

/* What was asked for, and now and then another page, with an odd number */
static void place_pages(unsigned int *seed)
{
    static const uint8_t contents[PAGE_SIZE];
    int done = 0, background = 0;

    for (;;) {
        /* First: those who have ended have asked before. */
        bool last = !qatomic_load_acquire(&at_work);
        int page = done < PAGES ? qatomic_read(&queue[done]) - 1 : -1;

        if (page >= 0) {
            done++;
        } else if (last) {
            return;
        } else if (background < PAGES / 2 && rand_r(seed) % 64 == 0) {
            page = 2 * background++ + 1;
        } else {
            continue;
        }
        if (postcopy_kvm_place_page(&ram, ram.host + page * PAGE_SIZE,
                                    contents)) {
            recover();
        }
        g_assert_cmpint(qatomic_read(&mis.page_requested_count), >=, 0);
    }
}

static uint32_t host_left[PAGES / SPLIT];

static void reset(const PostcopyKvmMethods *methods)
{
    int i;

    block.methods = methods;
    block.per_host_page = methods->split ? SPLIT : 1;
    ram.page_size = block.per_host_page * PAGE_SIZE;
    block.host_left = methods->split ? host_left : NULL;
    for (i = 0; i < PAGES / SPLIT; i++) {
        host_left[i] = SPLIT;
    }
    bitmap_zero(sent, PAGES);
    bitmap_zero(block.claimed, PAGES);
    bitmap_zero(block.requested, PAGES);
    bitmap_zero(block.filled, PAGES);
    bitmap_zero(block.present, PAGES);
    bitmap_zero(block.host_wanted, PAGES);
    block.run_pages = 0;
    memset(fills, 0, sizeof(fills));
    memset(asks, 0, sizeof(asks));
    memset(maps, 0, sizeof(maps));
    memset(published, 0, sizeof(published));
    memset(queue, 0, sizeof(queue));
    queued = 0;
}

static void check_round(void)
{
    unsigned long page;

    for (page = 0; page < PAGES; page++) {
        g_assert_cmpint(fills[page], ==, 1);
        if (!block.methods->split) {
            g_assert_cmpint(asks[page], <=, 1);
            g_assert_cmpint(asks[page], >=, page % 2 == 0);
        }
        g_assert_true(published[page]);
        /* Somebody waits for it in userfaultfd. */
        if (block.methods->map) {
            g_assert_cmpint(maps[page], >, 0);
        }
    }
    postcopy_kvm_show_rest(&block);
    g_assert_true(bitmap_empty(block.requested, PAGES));
    g_assert_cmpint(qatomic_read(&mis.page_requested_count), ==, 0);
}

static void test_stress(const void *opaque)
{
    const PostcopyKvmMethods *methods = opaque;
    unsigned int seed = g_test_rand_int();
    QemuThread threads[VCPUS + 1];
    Vcpu vcpus[VCPUS] = {};
    int nr, i;

    postcopy_kvm_pages_init(&mis);
    stream_seed = &seed;
    qatomic_set(&round_nr, 0);
    for (i = 0; i < VCPUS; i++) {
        vcpus[i].seed = g_test_rand_int();
        vcpus[i].waiter.wake = wake_vcpu;
        qemu_sem_init(&vcpus[i].woken, 0);
        qemu_thread_create(&threads[i], "vcpu", vcpu_thread, &vcpus[i],
                           QEMU_THREAD_JOINABLE);
    }
    qemu_thread_create(&threads[VCPUS], "fault", fault_thread, NULL,
                       QEMU_THREAD_JOINABLE);

    for (nr = 1; nr <= ROUNDS; nr++) {
        reset(methods);
        qatomic_set(&at_work, VCPUS + 1);
        qatomic_store_release(&round_nr, nr);
        place_pages(&seed);
        check_round();
    }

    for (i = 0; i <= VCPUS; i++) {
        qemu_thread_join(&threads[i]);
    }
    for (i = 0; i < VCPUS; i++) {
        qemu_sem_destroy(&vcpus[i].woken);
    }
}

static int woken;

static void count_wake(PostcopyKvmWaiter *w)
{
    woken++;
}

/*
 * Of any range, also where it does not begin at a word of the bitmap, or goes
 * beyond the block, and with huge pages.
 */
static void test_missing_range(void)
{
    unsigned int i, round, huge;
    PostcopyKvmBlock b = { .present = bitmap_new(PAGES) };

    for (round = 0; round < ROUNDS; round++) {
        uint64_t first = g_test_rand_int_range(0, PAGES + 70);
        uint64_t npages = g_test_rand_int_range(1, PAGES + 140);
        g_autofree unsigned long *missing = bitmap_new(npages);

        huge = round % 2 ? 8 : 1;
        b.page_size = huge * qemu_real_host_page_size();
        b.pages = g_test_rand_int_range(1, PAGES / huge + 1);
        for (i = 0; i < BITS_TO_LONGS(PAGES); i++) {
            b.present[i] = (unsigned long)g_test_rand_int() << 32 |
                           (uint32_t)g_test_rand_int();
        }
        bitmap_fill(missing, npages);

        postcopy_kvm_missing_range(&b, first, npages, missing);
        for (i = 0; i < npages; i++) {
            uint64_t offset = (first + i) * qemu_real_host_page_size();

            g_assert_cmpint(!!test_bit(i, missing), ==,
                            postcopy_kvm_missing(&b, offset));
        }
    }
    g_free(b.present);
}

/* Memory is unplugged while vCPUs wait for it, and others for other memory. */
static void test_removed(void)
{
    PostcopyKvmWaiter w[] = { { .wake = count_wake }, { .wake = count_wake },
                              { .wake = count_wake } };
    unsigned long requested[BITS_TO_LONGS(PAGES)] = { 0 };
    unsigned long empty[BITS_TO_LONGS(PAGES)] = { 0 };
    RAMBlock other_ram = { .page_size = PAGE_SIZE };
    PostcopyKvmBlock other = {
        .rb = &other_ram, .page_size = PAGE_SIZE, .pages = PAGES,
        .per_host_page = 1,
        .requested = requested, .filled = empty, .present = empty,
        .claimed = empty,
    };
    bool asked;

    reset(&all_methods[0]);
    qatomic_set(&mis.page_requested_count, 0);
    woken = 0;
    other_ram.postcopy_kvm = &other;
    postcopy_kvm_wait_for(&w[0], &other, 0, &asked);
    postcopy_kvm_wait_for(&w[1], &other, 70 * PAGE_SIZE, &asked);
    postcopy_kvm_wait_for(&w[2], &block, 0, &asked);
    g_assert_cmpint(mis.page_requested_count, ==, 3);

    postcopy_kvm_forget_block(&other);
    g_assert_cmpint(woken, ==, 2);
    g_assert_true(postcopy_kvm_ready(&w[0]) && postcopy_kvm_ready(&w[1]));
    g_assert_cmpint(mis.page_requested_count, ==, 1);
    /* Whoever gets tired of waiting does not look at the block. */
    memset(&other_ram, 0, sizeof(other_ram));
    g_assert_false(postcopy_kvm_unqueue(&w[0]));

    g_assert_true(postcopy_kvm_unqueue(&w[2]));
    mis.page_requested_count = 0;
}

/* In the end, whoever has not wanted a page before sees it, if it is whole. */
static void test_rest(void)
{
    unsigned long page;

    reset(&all_methods[3]);
    for (page = 0; page < PAGES; page++) {
        /* One page of the second huge page does not come. */
        if (page != SPLIT + 3) {
            postcopy_kvm_place_page(&ram, ram.host + page * PAGE_SIZE, NULL);
        }
        g_assert_cmpint(maps[page], ==, 0);
    }
    postcopy_kvm_show_rest(&block);
    for (page = 0; page < PAGES; page++) {
        g_assert_cmpint(maps[page], ==, page / SPLIT != 1);
    }
}

/*
 * The rest of a huge page may be under way when all that was asked for is
 * there, but for one that is discarded: nobody sends it.
 */
static void test_incomplete(void)
{
    const unsigned long first = 2 * SPLIT;
    unsigned long page;

    reset(&all_methods[3]);
    for (page = first; page < first + SPLIT; page++) {
        g_assert_cmpint(postcopy_kvm_incomplete(), ==, page > first);
        postcopy_kvm_place_page(&ram, ram.host + page * PAGE_SIZE, NULL);
    }
    g_assert_false(postcopy_kvm_incomplete());

    postcopy_kvm_place_page(&ram, ram.host, NULL);
    g_assert_true(postcopy_kvm_incomplete());
    discarded = 0;
    g_assert_false(postcopy_kvm_incomplete());
    discarded = -1;

    reset(&all_methods[2]);
    postcopy_kvm_place_page(&ram, ram.host, NULL);
    g_assert_false(postcopy_kvm_incomplete());
}

/*
 * A page that was discarded does not arrive, whoever wants it fills it.  What
 * says which pages have arrived may be freed meanwhile.
 */
static void test_discarded(void)
{
    PostcopyKvmWaiter w = { .wake = count_wake };
    bool asked;

    reset(&all_methods[0]);
    received = 0;
    discarded = 0;
    postcopy_kvm_wait_for(&w, &block, 0, &asked);
    discarded = -1;
    g_assert_true(postcopy_kvm_ready(&w));
    g_assert_cmpint(asks[0], ==, 0);
    g_assert_cmpint(fills[0], ==, 1);
    g_assert_cmpint(received, ==, 0);

    postcopy_kvm_place_page(&ram, ram.host + PAGE_SIZE, NULL);
    g_assert_cmpint(received, >, 0);
}

/* Somebody waits for a page that was discarded, or that has just come. */
static void test_fill_again(void)
{
    const PostcopyKvmMethods methods = {
        .fill = fill, .fill_zero = fill_zero, .fill_again = fill_again,
    };

    reset(&methods);
    qatomic_set(&mis.page_requested_count, 0);
    postcopy_kvm_request_page(&mis, &ram, PAGE_SIZE);
    g_assert_cmpint(asks[1], ==, 1);
    g_assert_cmpint(fills_again, ==, 0);
    postcopy_kvm_place_page(&ram, ram.host + PAGE_SIZE, NULL);
    postcopy_kvm_request_page(&mis, &ram, PAGE_SIZE);
    g_assert_cmpint(asks[1], ==, 1);
    g_assert_cmpint(fills[1], ==, 1);
    g_assert_cmpint(fills_again, ==, 1);
}

/* Requests may have been lost: what is still needed is asked for, once. */
static void test_ask_again(void)
{
    const ram_addr_t expected[] = {
        1 * PAGE_SIZE + 1, 3 * PAGE_SIZE + 1, SPLIT * PAGE_SIZE,
        (2 * SPLIT + 7) * PAGE_SIZE + 1,
    };
    const int needed[] = { 1, 3, SPLIT + 2, 2 * SPLIT + 7 };
    PostcopyKvmWaiter w[ARRAY_SIZE(needed)] = {};
    PostcopyKvmWaiter start = { .wake = count_wake };
    bool asked;
    size_t i;

    reset(&all_methods[3]);
    qatomic_set(&mis.page_requested_count, 0);
    for (i = 0; i < ARRAY_SIZE(w); i++) {
        w[i].wake = count_wake;
        postcopy_kvm_wait_for(&w[i], &block, needed[i] * PAGE_SIZE, &asked);
        g_assert_true(asked);
    }
    g_assert_true(postcopy_kvm_wait_for_host(&start, &block,
                                             SPLIT * PAGE_SIZE));
    g_assert_cmpint(mis.page_requested_count, ==, 3 + SPLIT);

    asked_again = g_array_new(false, false, sizeof(ram_addr_t));
    resuming = true;
    g_assert_cmpint(postcopy_kvm_resume(&mis), ==, 0);
    resuming = false;
    g_assert_cmpint(asked_again->len, ==, ARRAY_SIZE(expected));
    for (i = 0; i < ARRAY_SIZE(expected); i++) {
        g_assert_cmpint(g_array_index(asked_again, ram_addr_t, i), ==,
                        expected[i]);
    }
    g_array_free(asked_again, true);
    asked_again = NULL;

    woken = 0;
    postcopy_kvm_release_waiters();
    g_assert_cmpint(woken, ==, ARRAY_SIZE(w) + 1);
    mis.page_requested_count = 0;
}

int main(int argc, char **argv)
{
    size_t i;

    g_test_init(&argc, &argv, NULL);

    qemu_mutex_init(&block.run_lock);
    ram.host = g_malloc(PAGES * PAGE_SIZE);
    ram.postcopy_kvm = &block;
    QLIST_INSERT_HEAD_RCU(&ram_list.blocks, &ram, next);
    block.rb = &ram;
    block.page_size = PAGE_SIZE;
    block.pages = PAGES;
    block.claimed = bitmap_new(PAGES);
    block.requested = bitmap_new(PAGES);
    block.filled = bitmap_new(PAGES);
    block.present = bitmap_new(PAGES);
    block.host_wanted = bitmap_new(PAGES);

    postcopy_kvm_pages_init(&mis);
    g_test_add_func("/postcopy-kvm/page/missing-range", test_missing_range);
    g_test_add_func("/postcopy-kvm/page/removed", test_removed);
    g_test_add_func("/postcopy-kvm/page/rest", test_rest);
    g_test_add_func("/postcopy-kvm/page/incomplete", test_incomplete);
    g_test_add_func("/postcopy-kvm/page/discarded", test_discarded);
    g_test_add_func("/postcopy-kvm/page/fill-again", test_fill_again);
    g_test_add_func("/postcopy-kvm/page/ask-again", test_ask_again);
    for (i = 0; i < ARRAY_SIZE(all_methods); i++) {
        g_autofree char *path = g_strdup_printf("/postcopy-kvm/page/%s",
                                                all_methods[i].name);

        g_test_add_data_func(path, &all_methods[i], test_stress);
    }
    return g_test_run();
}
