/*
 * Post-copy migration with KVM Userfault
 *
 * vCPU threads resolve their own faults: an access to a page that has not
 * arrived ends KVM_RUN, the vCPU's thread asks the source for the page, waits
 * until whoever reads the stream has put it in place, and enters the guest
 * again.  userfaultfd still traps the accesses of everybody else.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/stats64.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qapi/clone-visitor.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-visit.h"
#include "qapi/qapi-types-migration.h"
#include "exec/cpu-common.h"
#include "hw/boards.h"
#include "hw/core/cpu.h"
#include "system/kvm-userfault.h"
#include "postcopy-kvm.h"
#include "postcopy-kvm-mem.h"
#include "postcopy-kvm-page.h"
#include "ram.h"
#include "trace.h"

/* As in postcopy-blocktime: bucket N counts waits of 2^N to 2^(N+1) us */
#define POSTCOPY_KVM_BUCKETS 24

/*
 * One per vCPU.  Except for @event and @waiter, used by the vCPU's own thread
 * only; query-migrate reads the counters while they change.
 */
typedef struct PostcopyKvmVcpu {
    /* Set when there may be a reason to end the wait */
    QemuEvent event;
    PostcopyKvmWaiter waiter;
    /*
     * When the vCPU first needed that page, 0 if it does not; and when it last
     * exited for it, which is later if a wait was interrupted
     */
    int64_t since;
    int64_t last;

    uint64_t exits;
    uint64_t resolved;
    uint64_t mapped;
    uint64_t requests;
    uint64_t wait_ns;
    uint64_t latency[POSTCOPY_KVM_BUCKETS];
} PostcopyKvmVcpu;

/* The start of the guest waits for some pages. */
typedef struct PostcopyKvmRun {
    QEMUBHFunc *run;
    MigrationIncomingState *mis;
    /* Pages that are missing, and one as long as they are being added */
    int left;
    unsigned int nr;
    PostcopyKvmWaiter *waiters;
} PostcopyKvmRun;

static struct {
    /*
     * Made once and kept: a vCPU that is about to wait when the migration
     * ends finds that there is nothing to wait for, but it has to look.
     */
    PostcopyKvmVcpu *vcpus;
    unsigned int nr_vcpus;

    bool active;
    bool used;

    /*
     * vCPUs that there are, those that wait, and since when none does anything
     * else, 0 if one does
     */
    int all;
    int waiting;
    int64_t all_since;
    Stat64 all_blocked_ns;

    Stat64 uffd_vcpu_faults;
    Stat64 uffd_other_faults;
    strList *fallback;
} state;

bool postcopy_kvm_active(void)
{
    return qatomic_read(&state.active);
}

uint64_t postcopy_kvm_uffd_mode(RAMBlock *rb)
{
    return rb->postcopy_kvm ? rb->postcopy_kvm->methods->uffd_mode : 0;
}

static PostcopyKvmVcpu *postcopy_kvm_vcpu(CPUState *cpu)
{
    assert(cpu->cpu_index < state.nr_vcpus);
    return &state.vcpus[cpu->cpu_index];
}

/* A page that the vCPU has waited for is there. */
static void postcopy_kvm_account_latency(PostcopyKvmVcpu *v, int64_t now)
{
    uint64_t us = (now - v->since) / SCALE_US;
    int bucket = us ? 63 - clz64(us) : 0;

    bucket = MIN(bucket, POSTCOPY_KVM_BUCKETS - 1);
    qatomic_set(&v->latency[bucket], v->latency[bucket] + 1);
    v->since = 0;
}

static bool postcopy_kvm_op_owns(RAMBlock *rb)
{
    return postcopy_kvm_owns(rb);
}

static void postcopy_kvm_op_missing(RAMBlock *rb, ram_addr_t offset,
                                    uint64_t npages, unsigned long *bitmap)
{
    postcopy_kvm_missing_range(rb->postcopy_kvm,
                               offset / qemu_real_host_page_size(), npages,
                               bitmap);
}

static void *postcopy_kvm_op_vcpu_ram(RAMBlock *rb, ram_addr_t offset)
{
    PostcopyKvmBlock *b = rb->postcopy_kvm;

    return b->methods->split ? b->alias + offset : NULL;
}

static void postcopy_kvm_op_keep_vcpu_ram(RAMBlock *rb)
{
    rb->postcopy_kvm->keep_alias = true;
}

static void postcopy_kvm_wake_vcpu(PostcopyKvmWaiter *w)
{
    qemu_event_set(&container_of(w, PostcopyKvmVcpu, waiter)->event);
}

/*
 * The page is filled: take the last steps for it, if they were not taken.  Who
 * placed it publishes it, too; don't spin until then.
 */
static void postcopy_kvm_resolved(PostcopyKvmVcpu *v, PostcopyKvmBlock *b,
                                  RAMBlock *rb, ram_addr_t offset)
{
    if (b && postcopy_kvm_missing(b, offset)) {
        if (postcopy_kvm_show_now(b, offset / b->page_size)) {
            /* The vCPU exits again. */
            g_usleep(POSTCOPY_KVM_RETRY_US);
        }
        qatomic_set(&v->mapped, v->mapped + 1);
    } else {
        kvm_userfault_publish(rb, offset, b ? b->page_size : rb->page_size);
        qatomic_set(&v->resolved, v->resolved + 1);
    }
    if (v->since) {
        postcopy_kvm_account_latency(v, get_clock());
    }
}

static bool postcopy_kvm_op_fault(CPUState *cpu, RAMBlock *rb,
                                  ram_addr_t offset)
{
    PostcopyKvmBlock *b = qatomic_rcu_read(&rb->postcopy_kvm);
    PostcopyKvmVcpu *v = postcopy_kvm_vcpu(cpu);
    bool asked;

    qatomic_set(&v->exits, v->exits + 1);
    offset = ROUND_DOWN(offset, b ? b->page_size : rb->page_size);
    if (v->waiter.rb != rb || v->waiter.offset != offset) {
        /* If it was interrupted, it has moved on to another page. */
        v->since = 0;
    }

    /* The lock-free way out: the page came while the vCPU was exiting. */
    if (!b || offset / b->page_size >= b->pages ||
        bitmap_test_acquire(b->filled, offset / b->page_size)) {
        postcopy_kvm_resolved(v, b, rb, offset);
        return false;
    }

    v->last = get_clock();
    if (!postcopy_kvm_wait_for(&v->waiter, b, offset, &asked)) {
        postcopy_kvm_unqueue(&v->waiter);
        postcopy_kvm_resolved(v, b, rb, offset);
        return false;
    }
    /* Pairs with smp_mb() in postcopy_kvm_cleanup(): it wakes us, or we go */
    smp_mb();
    if (!postcopy_kvm_active()) {
        postcopy_kvm_unqueue(&v->waiter);
        return false;
    }
    v->since = v->since ?: v->last;
    qatomic_set(&v->requests, v->requests + asked);
    trace_postcopy_kvm_fault(cpu->cpu_index, rb->idstr, offset, asked);
    return true;
}

/*
 * Whoever is the last to wait sets all_since, and the first to leave takes it
 * away.  If these two meet, either the latter sees it, or the former sees that
 * somebody has left.
 */
static void postcopy_kvm_wait_begin(void)
{
    if (qatomic_inc_fetch(&state.waiting) < state.all) {
        return;
    }
    qatomic_set_mb(&state.all_since, get_clock());
    if (qatomic_read(&state.waiting) < state.all) {
        qatomic_set(&state.all_since, 0);
    }
}

static void postcopy_kvm_wait_end(void)
{
    int64_t since;

    qatomic_dec(&state.waiting);
    if (!qatomic_read(&state.all_since)) {
        return;
    }
    since = qatomic_xchg(&state.all_since, 0);
    if (since) {
        stat64_add(&state.all_blocked_ns, get_clock() - since);
    }
}

/* Returns false if the vCPU has something else to do before. */
static bool postcopy_kvm_wait_ready(CPUState *cpu, PostcopyKvmVcpu *v)
{
    while (!postcopy_kvm_ready(&v->waiter)) {
        qemu_event_reset(&v->event);
        if (postcopy_kvm_ready(&v->waiter)) {
            break;
        }
        /*
         * Pairs with the store-release in cpu_exit(), which kicks us, too.
         * Some kick a vCPU and have no request, to have it out of the way.
         */
        if (qatomic_load_acquire(&cpu->exit_request) ||
            qatomic_read(&cpu->thread_kicked)) {
            postcopy_kvm_unqueue(&v->waiter);
            trace_postcopy_kvm_interrupted(cpu->cpu_index, v->waiter.offset);
            return false;
        }
        qemu_event_wait(&v->event);
    }
    return true;
}

static bool postcopy_kvm_op_wait(CPUState *cpu)
{
    PostcopyKvmVcpu *v = postcopy_kvm_vcpu(cpu);
    int64_t now;
    bool ready;

    postcopy_kvm_wait_begin();
    ready = postcopy_kvm_wait_ready(cpu, v);
    postcopy_kvm_wait_end();
    now = get_clock();
    qatomic_set(&v->wait_ns, v->wait_ns + now - v->last);
    if (ready) {
        postcopy_kvm_account_latency(v, now);
    }
    return ready;
}

static void postcopy_kvm_op_kick(CPUState *cpu)
{
    qemu_event_set(&postcopy_kvm_vcpu(cpu)->event);
}

static const KVMUserfaultOps postcopy_kvm_ops = {
    .owns = postcopy_kvm_op_owns,
    .vcpu_ram = postcopy_kvm_op_vcpu_ram,
    .keep_vcpu_ram = postcopy_kvm_op_keep_vcpu_ram,
    .missing = postcopy_kvm_op_missing,
    .fault = postcopy_kvm_op_fault,
    .wait = postcopy_kvm_op_wait,
    .kick = postcopy_kvm_op_kick,
};

static const char not_available[] = "KVM Userfault is off or not available";
static const char watched[] =
    "a vhost-user device waits for its pages in userfaultfd";

/*
 * A process of a vhost-user device waits in its own userfaultfd, for pages that
 * the file does not have.  It would take one that is about to be filled for one
 * that is.
 */
static bool postcopy_kvm_is_watched(MigrationIncomingState *mis, RAMBlock *rb)
{
    return mis->postcopy_remote_fds->len && qemu_ram_is_shared(rb);
}

static bool postcopy_kvm_fail_block(RAMBlock *rb, const char *why,
                                    Error **errp)
{
    error_setg(errp, "post-copy can't serve %s, a guest_memfd: %s", rb->idstr,
               why);
    return false;
}

bool postcopy_kvm_supported(Error **errp)
{
    bool available;
    RAMBlock *rb;

    if (!kvm_userfault_supported(&available, errp)) {
        return false;
    }

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (postcopy_kvm_block_needed(rb)) {
            const char *why = available ? postcopy_kvm_block_refuse(rb)
                                        : not_available;

            if (why) {
                return postcopy_kvm_fail_block(rb, why, errp);
            }
        }
    }
    return true;
}

bool postcopy_kvm_devices_supported(MigrationIncomingState *mis, Error **errp)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (postcopy_kvm_block_needed(rb) && postcopy_kvm_is_watched(mis, rb)) {
            return postcopy_kvm_fail_block(rb, watched, errp);
        }
    }
    return true;
}

/* A destination may try again after a migration that failed. */
static void postcopy_kvm_reset_counts(void)
{
    unsigned int i;

    for (i = 0; i < state.nr_vcpus; i++) {
        PostcopyKvmVcpu *v = &state.vcpus[i];

        v->exits = v->resolved = v->mapped = v->requests = v->wait_ns = 0;
        v->since = 0;
        memset(v->latency, 0, sizeof(v->latency));
    }
    stat64_init(&state.all_blocked_ns, 0);
    stat64_init(&state.uffd_vcpu_faults, 0);
    stat64_init(&state.uffd_other_faults, 0);
    g_clear_pointer(&state.fallback, qapi_free_strList);
    state.used = false;
}

/* Memory is unplugged.  Nothing that remains may refer to it. */
static void postcopy_kvm_block_removed(RAMBlockNotifier *n, void *host,
                                       size_t size, size_t max_size)
{
    ram_addr_t offset;
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(host, false, &offset);
    if (rb && rb->postcopy_kvm) {
        postcopy_kvm_forget_block(rb->postcopy_kvm);
        postcopy_kvm_block_cleanup(rb);
    }
}

static RAMBlockNotifier postcopy_kvm_notifier = {
    .ram_block_removed = postcopy_kvm_block_removed,
};

static void postcopy_kvm_init_state(MigrationIncomingState *mis)
{
    MachineState *ms = MACHINE(qdev_get_machine());
    unsigned int i;

    postcopy_kvm_pages_init(mis);
    state.all = ms->smp.cpus;
    if (!state.vcpus) {
        ram_block_notifier_add(&postcopy_kvm_notifier);
        state.nr_vcpus = ms->smp.max_cpus;
        state.vcpus = g_new0(PostcopyKvmVcpu, state.nr_vcpus);
        for (i = 0; i < state.nr_vcpus; i++) {
            qemu_event_init(&state.vcpus[i].event, false);
            state.vcpus[i].waiter.wake = postcopy_kvm_wake_vcpu;
        }
    }
    postcopy_kvm_reset_counts();
}

static void postcopy_kvm_fall_back(RAMBlock *rb, const char *why)
{
    trace_postcopy_kvm_fallback(rb->idstr, why);
    QAPI_LIST_PREPEND(state.fallback, g_strdup(rb->idstr));
}

/* Returns NULL, or why the block is left to userfaultfd. */
static const char *postcopy_kvm_setup_block(MigrationIncomingState *mis,
                                            RAMBlock *rb, bool available)
{
    if (!available) {
        return not_available;
    }
    if (postcopy_kvm_is_watched(mis, rb)) {
        return watched;
    }
    return postcopy_kvm_block_setup(rb);
}

int postcopy_kvm_setup(MigrationIncomingState *mis, Error **errp)
{
    bool available;
    RAMBlock *rb;

    postcopy_kvm_init_state(mis);
    if (!kvm_userfault_supported(&available, errp)) {
        return -1;
    }

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        const char *why = postcopy_kvm_setup_block(mis, rb, available);

        if (why && postcopy_kvm_block_needed(rb)) {
            postcopy_kvm_fail_block(rb, why, errp);
            return -1;
        }
        if (why) {
            postcopy_kvm_fall_back(rb, why);
        }
    }
    return 0;
}

/*
 * KVM does not trap the vCPUs' accesses.  userfaultfd then catches theirs,
 * too, which the methods of most memory types can cope with.
 */
static int postcopy_kvm_start_failed(Error *err, Error **errp)
{
    bool required = kvm_userfault_required();
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        required |= postcopy_kvm_block_needed(rb);
        /* KVM has not let go of what userfaultfd does not watch. */
        required |= postcopy_kvm_owns(rb) && rb->postcopy_kvm->keep_alias;
    }
    if (required) {
        error_propagate(errp, err);
        return -1;
    }

    warn_reportf_err(err, "post-copy goes on with userfaultfd: ");
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (postcopy_kvm_owns(rb)) {
            postcopy_kvm_fall_back(rb, "refused by KVM");
        }
    }
    return 0;
}

int postcopy_kvm_start(MigrationIncomingState *mis, Error **errp)
{
    Error *local_err = NULL;
    bool owns = false;
    RAMBlock *rb;

    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
            owns |= postcopy_kvm_owns(rb);
        }
    }
    if (!owns) {
        return 0;
    }

    qatomic_set(&state.active, true);
    if (!kvm_userfault_start(&postcopy_kvm_ops, &local_err)) {
        qatomic_set(&state.active, false);
        return postcopy_kvm_start_failed(local_err, errp);
    }
    state.used = true;
    trace_postcopy_kvm_start();
    return 0;
}

static void postcopy_kvm_run_unref(PostcopyKvmRun *r)
{
    if (qatomic_dec_fetch(&r->left)) {
        return;
    }

    migration_bh_schedule(r->run, r->mis);
    trace_postcopy_kvm_run(r->nr);
    g_free(r->waiters);
    g_free(r);
}

static void postcopy_kvm_wake_run(PostcopyKvmWaiter *w)
{
    postcopy_kvm_run_unref(w->opaque);
}

static void postcopy_kvm_run_count(RAMBlock *rb, ram_addr_t offset,
                                   void *opaque)
{
    unsigned int *max = opaque;

    ++*max;
}

static void postcopy_kvm_run_add(RAMBlock *rb, ram_addr_t offset, void *opaque)
{
    PostcopyKvmBlock *b = rb->postcopy_kvm;
    PostcopyKvmRun *r = opaque;
    PostcopyKvmWaiter *w = &r->waiters[r->nr];
    /* What vCPUs can have of a split block, KVM itself can, too. */
    bool mapped = b->methods->direct && !b->methods->split;
    bool asked, waits;

    /* A page that is direct may be present and not yet published. */
    offset = ROUND_DOWN(offset, b->page_size);
    if (offset >= rb->postcopy_length ||
        (!b->methods->direct && !postcopy_kvm_missing(b, offset))) {
        return;
    }

    w->wake = postcopy_kvm_wake_run;
    w->opaque = r;
    r->nr++;
    qatomic_inc(&r->left);
    if (mapped) {
        waits = postcopy_kvm_wait_for_host(w, b, offset);
    } else {
        waits = postcopy_kvm_wait_for(w, b, offset, &asked);
        if (!waits) {
            postcopy_kvm_show_now(b, offset / b->page_size);
        }
    }
    if (!waits && postcopy_kvm_unqueue(w)) {
        postcopy_kvm_run_unref(r);
    }
}

void postcopy_kvm_schedule_run(MigrationIncomingState *mis, QEMUBHFunc *run)
{
    PostcopyKvmRun *r = g_new0(PostcopyKvmRun, 1);
    unsigned int max = 0;

    r->run = run;
    r->mis = mis;
    r->left = 1;
    kvm_userfault_foreach_own_page(postcopy_kvm_run_count, &max);
    r->waiters = g_new0(PostcopyKvmWaiter, max);
    kvm_userfault_foreach_own_page(postcopy_kvm_run_add, r);
    postcopy_kvm_run_unref(r);
}

void postcopy_kvm_cleanup(MigrationIncomingState *mis)
{
    RAMBlock *rb;

    if (!state.vcpus) {
        return;
    }

    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH(rb) {
            if (postcopy_kvm_owns(rb)) {
                postcopy_kvm_show_rest(rb->postcopy_kvm);
            }
        }
    }
    kvm_userfault_stop();
    qatomic_set(&state.active, false);
    /* Pairs with smp_mb() in postcopy_kvm_op_fault() */
    smp_mb();
    postcopy_kvm_release_waiters();
    if (!mis->have_fault_thread) {
        postcopy_kvm_release_blocks();
    }
    trace_postcopy_kvm_stop();
}

void postcopy_kvm_release_blocks(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        postcopy_kvm_block_cleanup(rb);
    }
}

void postcopy_kvm_count_uffd_fault(uint32_t tid)
{
    CPUState *cpu;

    /* Another one may be unplugged, and freed, meanwhile. */
    QEMU_LOCK_GUARD(&qemu_cpu_list_lock);
    CPU_FOREACH(cpu) {
        if (cpu->thread_id == tid) {
            stat64_add(&state.uffd_vcpu_faults, 1);
            return;
        }
    }
    stat64_add(&state.uffd_other_faults, 1);
}

uint64_t postcopy_kvm_latency(int bucket)
{
    uint64_t count = 0;
    unsigned int i;

    for (i = 0; i < state.nr_vcpus && bucket < POSTCOPY_KVM_BUCKETS; i++) {
        count += qatomic_read(&state.vcpus[i].latency[bucket]);
    }
    return count;
}

void postcopy_kvm_add_blocktime(int cpu, uint64_t *ns, uint64_t *count)
{
    int i;

    if (cpu >= state.nr_vcpus) {
        return;
    }

    *ns += qatomic_read(&state.vcpus[cpu].wait_ns);
    for (i = 0; i < POSTCOPY_KVM_BUCKETS; i++) {
        *count += qatomic_read(&state.vcpus[cpu].latency[i]);
    }
}

uint64_t postcopy_kvm_all_blocked_ns(void)
{
    return stat64_get(&state.all_blocked_ns);
}

void postcopy_kvm_fill_info(MigrationInfo *info)
{
    PostcopyKvmInfo *kvm;
    unsigned int i;

    if (!state.vcpus) {
        return;
    }

    kvm = g_new0(PostcopyKvmInfo, 1);
    kvm->enabled = state.used;
    kvm->waiting = qatomic_read(&state.waiting);
    for (i = 0; i < state.nr_vcpus; i++) {
        PostcopyKvmVcpu *v = &state.vcpus[i];

        kvm->exits += qatomic_read(&v->exits);
        kvm->resolved += qatomic_read(&v->resolved);
        kvm->mapped += qatomic_read(&v->mapped);
        kvm->requests += qatomic_read(&v->requests);
        kvm->wait_ns += qatomic_read(&v->wait_ns);
    }
    for (i = POSTCOPY_KVM_BUCKETS; i > 0; i--) {
        QAPI_LIST_PREPEND(kvm->latency_dist, postcopy_kvm_latency(i - 1));
    }
    postcopy_kvm_pages_fill_info(kvm);
    kvm->uffd_vcpu_faults = stat64_get(&state.uffd_vcpu_faults);
    kvm->uffd_other_faults = stat64_get(&state.uffd_other_faults);
    kvm->fallback = QAPI_CLONE(strList, state.fallback);
    info->kvm_userfault = kvm;
}
