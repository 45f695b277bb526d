/*
 * KVM Userfault, without KVM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "system/kvm-userfault.h"

bool kvm_userfault_supported(bool *available, Error **errp)
{
    *available = false;
    return true;
}

bool kvm_userfault_can_look_elsewhere(void)
{
    return false;
}

bool kvm_userfault_required(void)
{
    return false;
}

bool kvm_userfault_start(const KVMUserfaultOps *ops, Error **errp)
{
    g_assert_not_reached();
}

void kvm_userfault_foreach_own_page(KVMUserfaultPageFunc *fn, void *opaque)
{
}

void kvm_userfault_stop(void)
{
}

void kvm_userfault_publish(RAMBlock *rb, ram_addr_t offset, size_t len)
{
}
