/*
 * KVM Userfault: let vCPU threads resolve their own faults
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SYSTEM_KVM_USERFAULT_H
#define SYSTEM_KVM_USERFAULT_H

#include "exec/hwaddr.h"
#include "exec/memattrs.h"
#include "system/ramblock.h"

/*
 * While KVM Userfault is active, each KVM memory slot whose RAM is owned by
 * the user of this interface has a bitmap with one bit per host page.  An
 * access by a vCPU to a page whose bit is set ends KVM_RUN, and the vCPU
 * thread calls @fault and, if need be, @wait.  kvm_userfault_publish() clears
 * the bits.  KVM never writes to the bitmaps.
 *
 * All offsets are in bytes into the RAMBlock.
 */
typedef struct KVMUserfaultOps {
    /*
     * Whether vCPU accesses to @rb are to be trapped.  Called with the BQL,
     * whenever a memory slot appears; the answer must not change while
     * KVM Userfault is active.
     */
    bool (*owns)(RAMBlock *rb);

    /*
     * Where KVM has to look up the page of @rb at @offset, and those that come
     * after it, once they are published: another mapping of the same memory; or
     * NULL for the RAMBlock's own, which everybody else uses in any case.
     * Called as @owns, if that is true.  It must remain until
     * kvm_userfault_stop().
     */
    void *(*vcpu_ram)(RAMBlock *rb, ram_addr_t offset);

    /* Unlike what was said, @vcpu_ram has to remain.  Called with the BQL. */
    void (*keep_vcpu_ram)(RAMBlock *rb);

    /*
     * Set in @bitmap, which has @npages bits, the bits of the pages from
     * @offset on that are not in place, and clear the others.  Called with
     * the BQL.  A page that is in place remains so.
     */
    void (*missing)(RAMBlock *rb, ram_addr_t offset, uint64_t npages,
                    unsigned long *bitmap);

    /*
     * @cpu cannot go on without the page at @offset.  Called on the vCPU's
     * thread, in an RCU read-side critical section, with or without the BQL;
     * must not wait for the page.  Returns false if the page is in place, and
     * published; true if the vCPU thread has to call @wait.
     */
    bool (*fault)(CPUState *cpu, RAMBlock *rb, ram_addr_t offset);

    /*
     * Wait until the page of the last @fault is in place.  Called on the
     * vCPU's thread, without the BQL, outside of any critical section.
     * Returns false if cpu->exit_request ended the wait.
     */
    bool (*wait)(CPUState *cpu);

    /* cpu->exit_request was set.  End @wait.  Called on any thread. */
    void (*kick)(CPUState *cpu);
} KVMUserfaultOps;

/**
 * kvm_userfault_supported: whether KVM Userfault can and may be used
 *
 * @available: set to true if it can be used, and to false if the accelerator
 *             is another one, the host's kernel does not have it, or it was
 *             turned off with -accel kvm,userfault=off
 * @errp: set if -accel kvm,userfault=on asks for what the kernel does not have
 *
 * Returns: false if @errp was set
 */
bool kvm_userfault_supported(bool *available, Error **errp);

/* Whether KVMUserfaultOps.vcpu_ram may return something */
bool kvm_userfault_can_look_elsewhere(void);

/* Whether to do without KVM Userfault is an error: -accel kvm,userfault=on */
bool kvm_userfault_required(void);

/**
 * kvm_userfault_start: trap accesses to the RAM that @ops owns
 *
 * Called with the BQL, while no vCPU runs.  Slots that appear later are
 * included.
 *
 * Returns: false, with @errp set and nothing changed, if KVM refuses
 */
bool kvm_userfault_start(const KVMUserfaultOps *ops, Error **errp);

/* A page of RAM; @offset is aligned to the host's page size. */
typedef void KVMUserfaultPageFunc(RAMBlock *rb, ram_addr_t offset,
                                  void *opaque);

/**
 * kvm_userfault_foreach_own_page: find what KVM itself needs to run the vCPUs
 *
 * KVM reads and writes some guest memory of its own accord: paravirtual
 * clocks, steal time, end-of-interrupt flags and the like.  KVM Userfault does
 * not trap that.  Calls @fn for each such page, maybe more than once.
 *
 * Called with the BQL, once the vCPUs' state is complete.
 */
void kvm_userfault_foreach_own_page(KVMUserfaultPageFunc *fn, void *opaque);

/**
 * kvm_userfault_stop: stop to trap accesses
 *
 * Called with the BQL.  vCPUs may be running.  Does nothing if KVM Userfault
 * is not active.
 */
void kvm_userfault_stop(void);

/**
 * kvm_userfault_publish: let vCPUs access pages that are in place
 *
 * Clears the bits of the pages in every memory slot that maps them.  Before
 * the call, a vCPU's access must have become possible without any other
 * fault, and ops->missing must already say that the pages are in place: a
 * slot that appears at the same time goes by that.
 *
 * Called on any thread.  Takes no lock.
 */
void kvm_userfault_publish(RAMBlock *rb, ram_addr_t offset, size_t len);

#endif
