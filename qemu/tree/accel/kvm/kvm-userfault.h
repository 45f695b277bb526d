/*
 * KVM Userfault: what the KVM accelerator calls
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef ACCEL_KVM_USERFAULT_H
#define ACCEL_KVM_USERFAULT_H

#include "system/kvm_int.h"
#include "system/kvm-userfault.h"
#include "qemu/rcu.h"

/* The flags of a slot that are this file's */
#define KVM_USERFAULT_SLOT_FLAGS (KVM_MEM_USERFAULT | KVM_MEM_USERFAULT_ADDR)

/* A slot's bitmap.  Read by KVM until the slot's flag is off. */
struct KVMUserfaultBitmap {
    struct rcu_head rcu;
    unsigned long bits[];
};

/* Add -accel kvm,userfault=on|off|auto to the accelerator class @oc. */
void kvm_userfault_class_init(ObjectClass *oc);

/*
 * @slot is about to be given to KVM.  Add the flag and a bitmap if its RAM is
 * trapped.  Called with the BQL and kvm_slots_lock.
 */
void kvm_userfault_slot_init(KVMSlot *slot);

/* @slot was taken from KVM.  Called with the BQL and kvm_slots_lock. */
void kvm_userfault_slot_fini(KVMSlot *slot);

/*
 * Handle an exit of @cpu with KVM_MEMORY_EXIT_FLAG_USERFAULT for @gpa.  Called
 * on the vCPU's thread, without the BQL.
 *
 * Returns 0 to enter the guest again, EXCP_INTERRUPT if cpu->exit_request
 * came first, and -1 if there is no RAM at @gpa.
 */
int kvm_userfault_handle_exit(CPUState *cpu, hwaddr gpa, MemTxAttrs attrs);

/* Guest memory from @gpa on, @len bytes, not 0 */
typedef void KVMUserfaultRangeFunc(hwaddr gpa, hwaddr len, void *opaque);

/*
 * Call @fn for the guest memory that KVM accesses, of its own accord, to run
 * @cpu.  Called with the BQL.
 */
#ifdef TARGET_I386
void kvm_arch_userfault_own_memory(CPUState *cpu, KVMUserfaultRangeFunc *fn,
                                   void *opaque);
#else
static inline void kvm_arch_userfault_own_memory(CPUState *cpu,
                                                 KVMUserfaultRangeFunc *fn,
                                                 void *opaque)
{
}
#endif

/* AccelOpsClass.kick_vcpu_thread: ends the wait for a page, too. */
void kvm_userfault_kick_vcpu_thread(CPUState *cpu);

#endif
