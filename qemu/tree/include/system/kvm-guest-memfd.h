/*
 * guest_memfd memory that is shared with QEMU
 *
 * The memory of a RAMBlock is a file that KVM made for this VM.  QEMU has it
 * mapped.  KVM takes the pages of vCPUs straight from the file, so what is done
 * to QEMU's mapping, e.g. with userfaultfd, does not concern them.
 *
 * Not to be confused with RAMBlock.guest_memfd, which is the private memory of
 * confidential guests, beside the memory that the RAMBlock stands for.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_SYSTEM_KVM_GUEST_MEMFD_H
#define QEMU_SYSTEM_KVM_GUEST_MEMFD_H

#include "qemu/mmap-alloc.h"
#include "system/ramblock.h"

#define TYPE_MEMORY_BACKEND_GUEST_MEMFD "memory-backend-guest-memfd"

/**
 * kvm_guest_memfd_create_shared: make a guest_memfd that QEMU can map
 *
 * @size: in bytes, a multiple of the host's page size
 *
 * Returns: a file descriptor; or -1 with @errp set if KVM is not used, or the
 *          host's kernel can't do it
 */
int kvm_guest_memfd_create_shared(uint64_t size, Error **errp);

/* Whether the memory of @rb was made by kvm_guest_memfd_create_shared(). */
static inline bool qemu_ram_is_guest_memfd(RAMBlock *rb)
{
    return qemu_fd_getfs(rb->fd) == QEMU_FS_TYPE_GUEST_MEMFD;
}

#endif
