/*
 * guest_memfd memory that is shared with QEMU: stub without KVM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "system/kvm-guest-memfd.h"

int kvm_guest_memfd_create_shared(uint64_t size, Error **errp)
{
    error_setg(errp, "guest_memfd memory needs -accel kvm, which this QEMU was"
               " built without");
    return -1;
}
