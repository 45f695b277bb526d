/*
 * guest_memfd memory that is shared with QEMU
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/range.h"
#include "migration/blocker.h"
#include "system/kvm.h"
#include "kvm-guest-memfd.h"

#include <linux/kvm.h>

/* All such memory can't be migrated, or all can. */
static Error *dirty_log_blocker;

static bool kvm_guest_memfd_check_dirty_log(Error **errp)
{
    if (dirty_log_blocker ||
        kvm_vm_check_extension(kvm_state, KVM_CAP_GUEST_MEMFD_DIRTY_LOG)) {
        return true;
    }

    error_setg(&dirty_log_blocker, "the host's kernel can't log which pages of"
               " a guest_memfd change (KVM_CAP_GUEST_MEMFD_DIRTY_LOG)");
    return !migrate_add_blocker(&dirty_log_blocker, errp);
}

int kvm_guest_memfd_create_shared(uint64_t size, Error **errp)
{
    uint64_t flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    struct kvm_create_guest_memfd args = { .size = size };
    uint64_t known;
    int fd;

    if (!kvm_enabled()) {
        error_setg(errp, "guest_memfd memory needs -accel kvm");
        return -1;
    }

    known = kvm_vm_check_extension(kvm_state, KVM_CAP_GUEST_MEMFD_FLAGS);
    if ((known & flags) != flags) {
        error_setg(errp, "the host's kernel has no guest_memfd that can be"
                   " mapped (KVM_CAP_GUEST_MEMFD_FLAGS)");
        return -1;
    }
    if (!kvm_guest_memfd_check_dirty_log(errp)) {
        return -1;
    }

    /* Only post-copy has a use for it, and says so if it is missing. */
    args.flags = flags | (known & GUEST_MEMFD_FLAG_WRITE);
    fd = kvm_vm_ioctl(kvm_state, KVM_CREATE_GUEST_MEMFD, &args);
    if (fd < 0) {
        error_setg_errno(errp, -fd, "can't create a guest_memfd");
        return -1;
    }
    return fd;
}

/* Whether a slot is bound to any of the pages that @slot would be bound to. */
static bool kvm_guest_memfd_is_bound(KVMMemoryListener *kml, KVMSlot *slot)
{
    int i;

    for (i = 0; i < kml->nr_slots_allocated; i++) {
        KVMSlot *other = &kml->slots[i];

        if (other != slot && other->memory_size &&
            (other->flags & KVM_MEM_GUEST_MEMFD) &&
            ranges_overlap(other->ram_start_offset, other->memory_size,
                           slot->ram_start_offset, slot->memory_size)) {
            return true;
        }
    }
    return false;
}

/*
 * Writes to read-only memory are MMIO, which KVM does not offer for a
 * guest_memfd, and it binds each page of one to one slot at the most.  So
 * read-only and second views of RAM, e.g. SMRAM, and all of other address
 * spaces go through QEMU's mapping, as with any other type of memory.
 */
void kvm_guest_memfd_slot_init(KVMMemoryListener *kml, KVMSlot *slot,
                               RAMBlock *rb)
{
    if (kml->as_id || (slot->flags & KVM_MEM_READONLY) ||
        !qemu_ram_is_guest_memfd(rb) || kvm_guest_memfd_is_bound(kml, slot)) {
        return;
    }

    slot->flags |= KVM_MEM_GUEST_MEMFD;
    slot->guest_memfd = rb->fd;
    slot->guest_memfd_offset = slot->ram_start_offset - rb->offset +
                               rb->fd_offset;
}
