/*
 * guest_memfd memory that is shared with QEMU: what the KVM accelerator calls
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef ACCEL_KVM_GUEST_MEMFD_H
#define ACCEL_KVM_GUEST_MEMFD_H

#include "system/kvm_int.h"
#include "system/kvm-guest-memfd.h"

/*
 * @slot, for RAM of @rb, is about to be given to KVM.  Bind it to the file if
 * it can be.  Called with the BQL and kvm_slots_lock.
 */
void kvm_guest_memfd_slot_init(KVMMemoryListener *kml, KVMSlot *slot,
                               RAMBlock *rb);

#endif
