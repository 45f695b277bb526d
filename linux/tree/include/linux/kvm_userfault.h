/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __LINUX_KVM_USERFAULT_H
#define __LINUX_KVM_USERFAULT_H

#include <linux/errno.h>
#include <linux/kvm.h>
#include <linux/types.h>

struct kvm;
struct kvm_memory_slot;
struct kvm_vcpu;

/*
 * KVM Userfault: userspace marks pages of a memslot, one bit per page, and a
 * vCPU that needs a marked page mapped exits to userspace instead.
 *
 * The bitmap lives in userspace memory and belongs to userspace.  KVM only
 * ever reads it, and for vCPUs only where it may sleep, i.e. not under mmu_lock.
 *
 * The interface follows the KVM Userfault proposal of James Houghton.
 */
#ifdef CONFIG_HAVE_KVM_USERFAULT

/*
 * Validate the userfault part of @mem before it is installed in a memslot.
 * @old is the slot that @mem modifies, NULL if @mem creates one.
 *
 * Returns 0, or -EINVAL if the bitmap is at 0, is misaligned, is not entirely in
 * userspace, or differs from the bitmap that is already in use.
 */
int kvm_userfault_check_region(const struct kvm_userspace_memory_region2 *mem,
			       const struct kvm_memory_slot *old);

/* Let @new, not yet visible to anybody, use the bitmap that @mem names. */
void kvm_userfault_init_slot(struct kvm_memory_slot *new,
			     const struct kvm_userspace_memory_region2 *mem);

/*
 * Decide whether a vCPU may get @gfn of @slot mapped.  May sleep; the caller
 * holds kvm->srcu, and does not hold mmu_lock.
 *
 * Returns 0 if the page's bit is clear, i.e. its contents are in place.
 * Otherwise returns -EFAULT; if the bit is set and the fault is not a
 * @prefetch, the exit to userspace is filled in, too.
 */
int kvm_userfault_faultin(struct kvm_vcpu *vcpu,
			  const struct kvm_memory_slot *slot, gfn_t gfn,
			  bool is_private, bool prefetch);

#else

static inline int
kvm_userfault_check_region(const struct kvm_userspace_memory_region2 *mem,
			   const struct kvm_memory_slot *old)
{
	return 0;
}

static inline void
kvm_userfault_init_slot(struct kvm_memory_slot *new,
			const struct kvm_userspace_memory_region2 *mem)
{
}

static inline int kvm_userfault_faultin(struct kvm_vcpu *vcpu,
					const struct kvm_memory_slot *slot,
					gfn_t gfn, bool is_private,
					bool prefetch)
{
	return 0;
}

#endif /* CONFIG_HAVE_KVM_USERFAULT */

#endif /* __LINUX_KVM_USERFAULT_H */
