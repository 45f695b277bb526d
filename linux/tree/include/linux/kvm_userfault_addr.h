/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __LINUX_KVM_USERFAULT_ADDR_H
#define __LINUX_KVM_USERFAULT_ADDR_H

#include <linux/kvm.h>
#include <linux/types.h>

struct kvm_memory_slot;
struct kvm_memslots;

/*
 * KVM_MEM_USERFAULT_ADDR: while userfault is on, pages whose bit is clear are
 * looked up in another mapping of the memory than the one that everybody else
 * goes through: for the faults of vCPUs, and for KVM's own accesses.
 *
 * That lets a vCPU have 4 KiB of a huge page of hugetlbfs that is not complete
 * yet: the other mapping has the huge page, while userfaultfd keeps that of
 * userspace_addr empty until the rest has come.  There, KVM's own accesses wait
 * for a page whose bit is set, as they can't exit.
 *
 * What a vCPU has mapped from there has to be found by the MMU notifier, by its
 * address there.  Memslots therefore have a second interval tree.
 */
#ifdef CONFIG_HAVE_KVM_USERFAULT

/*
 * Validate the address in @mem before it is installed in a memslot.  @old is the
 * slot that @mem modifies, NULL if @mem creates one.
 *
 * Returns 0, or -EINVAL if the address is misaligned, is not entirely in
 * userspace, or differs from what is already in use, or if the slot has no
 * bitmap, or a guest_memfd.
 */
int kvm_userfault_check_addr(const struct kvm_userspace_memory_region2 *mem,
			     const struct kvm_memory_slot *old);

/* Let @new, not yet visible to anybody, use the address that @mem names. */
void kvm_userfault_init_addr(struct kvm_memory_slot *new,
			     const struct kvm_userspace_memory_region2 *mem);

/*
 * Make @busy, a copy of the slot that @new is to replace, one that vCPUs can't
 * have pages of, and that the MMU notifier finds by whatever address the two have.
 */
void kvm_userfault_init_busy(struct kvm_memory_slot *busy,
			     const struct kvm_memory_slot *new);

/*
 * Add @slot to, or remove it from, those of @slots, which are inactive, that
 * the MMU notifier finds by their second address, if it has one.
 */
void kvm_userfault_insert_addr(struct kvm_memslots *slots,
			       struct kvm_memory_slot *slot);
void kvm_userfault_remove_addr(struct kvm_memslots *slots,
			       struct kvm_memory_slot *slot);

/*
 * Where to look up, for a vCPU, the page of @slot that is at @hva for everybody
 * else.
 */
unsigned long kvm_userfault_hva(const struct kvm_memory_slot *slot,
				unsigned long hva);

/*
 * Where KVM itself is to access @gfn of @slot, which is at @hva for userspace:
 * with vCPUs if its bit is clear, or else there, where userfaultfd has it wait.
 *
 * May sleep.  The caller holds kvm->srcu, and may keep the result until the
 * generation of the memslots changes, as a bit that is set again does not take
 * away what was mapped before.
 */
unsigned long kvm_userfault_own_hva(const struct kvm_memory_slot *slot,
				    gfn_t gfn, unsigned long hva);

/*
 * The same for where KVM can't sleep.  If the bitmap isn't mapped at the moment,
 * the bit counts as set.
 */
unsigned long kvm_userfault_own_hva_nofault(const struct kvm_memory_slot *slot,
					    gfn_t gfn, unsigned long hva);

#else

static inline int
kvm_userfault_check_addr(const struct kvm_userspace_memory_region2 *mem,
			 const struct kvm_memory_slot *old)
{
	return 0;
}

static inline void
kvm_userfault_init_addr(struct kvm_memory_slot *new,
			const struct kvm_userspace_memory_region2 *mem)
{
}

static inline void kvm_userfault_init_busy(struct kvm_memory_slot *busy,
					   const struct kvm_memory_slot *new)
{
}

static inline void kvm_userfault_insert_addr(struct kvm_memslots *slots,
					     struct kvm_memory_slot *slot)
{
}

static inline void kvm_userfault_remove_addr(struct kvm_memslots *slots,
					     struct kvm_memory_slot *slot)
{
}

static inline unsigned long
kvm_userfault_hva(const struct kvm_memory_slot *slot, unsigned long hva)
{
	return hva;
}

static inline unsigned long
kvm_userfault_own_hva(const struct kvm_memory_slot *slot, gfn_t gfn,
		      unsigned long hva)
{
	return hva;
}

static inline unsigned long
kvm_userfault_own_hva_nofault(const struct kvm_memory_slot *slot, gfn_t gfn,
			      unsigned long hva)
{
	return hva;
}

#endif /* CONFIG_HAVE_KVM_USERFAULT */

#endif /* __LINUX_KVM_USERFAULT_ADDR_H */
