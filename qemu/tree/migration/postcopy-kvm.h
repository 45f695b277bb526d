/*
 * Post-copy migration with KVM Userfault
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_POSTCOPY_KVM_H
#define QEMU_MIGRATION_POSTCOPY_KVM_H

#include "migration.h"
#include "system/ramblock.h"

/**
 * postcopy_kvm_supported: check that the host can do what was asked for
 *
 * Returns: false, with @errp set, if KVM Userfault is required by
 *          -accel kvm,userfault=on and the host does not have it
 */
bool postcopy_kvm_supported(Error **errp);

/**
 * postcopy_kvm_devices_supported: check who else waits for pages
 *
 * To be called once devices have heard of the migration
 * (POSTCOPY_NOTIFY_INBOUND_ADVISE) and while the guest still runs on the
 * source: postcopy_kvm_setup() would refuse the same, at the switch-over.
 *
 * Returns: false, with @errp set, if there is memory that only KVM Userfault
 *          can serve, and a device whose process counts on userfaultfd
 */
bool postcopy_kvm_devices_supported(MigrationIncomingState *mis, Error **errp);

/**
 * postcopy_kvm_setup: decide how each RAMBlock is served
 *
 * Called with the BQL, before there is a fault thread.  A RAMBlock
 * of a type that is not covered stays with plain userfaultfd.  Must be
 * undone with postcopy_kvm_cleanup(), even if it fails.
 *
 * Returns: 0, or -1 with @errp set
 */
int postcopy_kvm_setup(MigrationIncomingState *mis, Error **errp);

/**
 * postcopy_kvm_start: trap the vCPUs' accesses to what has not arrived
 *
 * Called with the BQL, while no vCPU runs and no page is being received.
 *
 * Returns: 0, or -1 with @errp set if KVM refuses and userfault=on
 */
int postcopy_kvm_start(MigrationIncomingState *mis, Error **errp);

/**
 * postcopy_kvm_schedule_run: schedule @run, which starts the guest
 *
 * First come the pages that KVM itself needs to run the vCPUs, as KVM
 * Userfault does not trap its accesses: they would be served by userfaultfd
 * one after the other, with the vCPU's thread out of reach, partly with the
 * BQL.  Here they are asked for at once and nobody is blocked.  @run is
 * scheduled in any case: if the migration fails, when it is cleaned up.
 *
 * Called with the BQL, when the state of all devices is loaded.
 */
void postcopy_kvm_schedule_run(MigrationIncomingState *mis, QEMUBHFunc *run);

/*
 * Called with the BQL, when all pages are in place or the migration failed.
 * The fault thread, if there is one, still serves pages after that.
 */
void postcopy_kvm_cleanup(MigrationIncomingState *mis);

/* Called with the BQL, once the fault thread has ended. */
void postcopy_kvm_release_blocks(void);

/* True while vCPU threads may send requests, beside the fault thread. */
bool postcopy_kvm_active(void);

/* Whether the pages of @rb are placed and requested by the functions below. */
static inline bool postcopy_kvm_owns(RAMBlock *rb)
{
    return qatomic_read(&rb->postcopy_kvm) != NULL;
}

/* The mode to register @rb with, beside UFFDIO_REGISTER_MODE_MISSING. */
uint64_t postcopy_kvm_uffd_mode(RAMBlock *rb);

/*
 * The size of pages that are placed in @rb, in bytes: those of the RAMBlock, or
 * smaller ones, in any order, that it is made of.
 */
size_t postcopy_kvm_place_size(RAMBlock *rb);

/**
 * postcopy_kvm_place_page: put a page in place, and let waiters go on
 *
 * @host: where the page, of postcopy_kvm_place_size(), is in QEMU's address
 *        space
 * @from: its contents, or NULL for zeros
 *
 * A page that is in place already is left alone, as the guest may have
 * changed it.
 *
 * Returns: 0, or -errno
 */
int postcopy_kvm_place_page(RAMBlock *rb, void *host, const void *from);

/**
 * postcopy_kvm_request_page: a thread that is not a vCPU in the guest waits
 * in userfaultfd for the page at @offset
 *
 * Called in the fault thread, also while post-copy is paused: pages that are
 * there are mapped then, too, and others are asked for after the recovery.
 */
void postcopy_kvm_request_page(MigrationIncomingState *mis, RAMBlock *rb,
                               ram_addr_t offset);

/**
 * postcopy_kvm_resume: go on after a recovery
 *
 * Asks again for all pages that somebody waits for, and maps those that could
 * not be mapped when they arrived.
 *
 * Returns: 0, or -errno if there is still one that can't be mapped
 */
int postcopy_kvm_resume(MigrationIncomingState *mis);

/*
 * Whether a part of a huge page has come and the rest has not.  On the preempt
 * channel, the source may send more of a huge page than what was asked for.
 */
bool postcopy_kvm_incomplete(void);

/* Account a fault that userfaultfd reported, of the thread @tid. */
void postcopy_kvm_count_uffd_fault(uint32_t tid);

/**
 * postcopy_kvm_add_blocktime: add the waits of one vCPU
 *
 * @cpu: its index
 * @ns: how long it has waited, in nanoseconds
 * @count: how often
 *
 * Only waits after userfault exits are added.  postcopy-blocktime itself counts
 * waits in userfaultfd, but not for RAM that KVM Userfault serves: it would
 * have to see each page arrive, with a lock.
 */
void postcopy_kvm_add_blocktime(int cpu, uint64_t *ns, uint64_t *count);

/* How many waits of all vCPUs took from 2^@bucket to 2^(@bucket + 1) us. */
uint64_t postcopy_kvm_latency(int bucket);

/* For how long all vCPUs have waited at once, in nanoseconds. */
uint64_t postcopy_kvm_all_blocked_ns(void);

/* Fill in @info->kvm_userfault, if there is or was a post-copy migration. */
void postcopy_kvm_fill_info(MigrationInfo *info);

#endif
