// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM Userfault: look up pages that are there elsewhere than at userspace_addr.
 */
#include <linux/bits.h>
#include <linux/kvm_host.h>
#include <linux/kvm_userfault_addr.h>
#include <linux/uaccess.h>

int kvm_userfault_check_addr(const struct kvm_userspace_memory_region2 *mem,
			     const struct kvm_memory_slot *old)
{
	unsigned long addr = mem->userfault_addr;

	/* Can't come or go, or change, while vCPUs go by it. */
	if (kvm_slot_has_userfault(old) && (mem->flags & KVM_MEM_USERFAULT) &&
	    ((old->flags ^ mem->flags) & KVM_MEM_USERFAULT_ADDR))
		return -EINVAL;

	if (!(mem->flags & KVM_MEM_USERFAULT_ADDR))
		return 0;

	/* Pages of a guest_memfd are looked up in the file. */
	if (!(mem->flags & KVM_MEM_USERFAULT) ||
	    (mem->flags & KVM_MEM_GUEST_MEMFD))
		return -EINVAL;

	if (!addr || !PAGE_ALIGNED(addr) || mem->userfault_addr != addr ||
	    mem->userfault_addr != untagged_addr(mem->userfault_addr) ||
	    !access_ok((void __user *)addr, mem->memory_size))
		return -EINVAL;

	if (kvm_slot_has_userfault(old) && old->userfault_addr != addr)
		return -EINVAL;

	return 0;
}

void kvm_userfault_init_addr(struct kvm_memory_slot *new,
			     const struct kvm_userspace_memory_region2 *mem)
{
	if (new->flags & KVM_MEM_USERFAULT_ADDR)
		new->userfault_addr = mem->userfault_addr;
}

void kvm_userfault_init_busy(struct kvm_memory_slot *busy,
			     const struct kvm_memory_slot *new)
{
	/* Of @busy and @new, one has them. */
	if (new->flags & KVM_MEM_USERFAULT_ADDR) {
		busy->userfault_bitmap = new->userfault_bitmap;
		busy->userfault_addr = new->userfault_addr;
	}

	busy->flags |= KVM_MEM_USERFAULT | KVM_MEM_USERFAULT_ADDR |
		       KVM_MEMSLOT_USERFAULT_BUSY;
}

void kvm_userfault_insert_addr(struct kvm_memslots *slots,
			       struct kvm_memory_slot *slot)
{
	struct interval_tree_node *node = &slot->userfault_node[slots->node_idx];

	if (!slot->userfault_addr)
		return;

	node->start = slot->userfault_addr;
	node->last = slot->userfault_addr + (slot->npages << PAGE_SHIFT) - 1;
	interval_tree_insert(node, &slots->userfault_tree);
}

void kvm_userfault_remove_addr(struct kvm_memslots *slots,
			       struct kvm_memory_slot *slot)
{
	if (slot->userfault_addr)
		interval_tree_remove(&slot->userfault_node[slots->node_idx],
				     &slots->userfault_tree);
}

unsigned long kvm_userfault_hva(const struct kvm_memory_slot *slot,
				unsigned long hva)
{
	if (likely(!(slot->flags & KVM_MEM_USERFAULT_ADDR)))
		return hva;

	return hva - slot->userspace_addr + slot->userfault_addr;
}

/* A page counts as one that isn't there if the bitmap can't be read. */
static unsigned long kvm_userfault_choose_hva(const struct kvm_memory_slot *slot,
					      gfn_t gfn, unsigned long hva,
					      bool nofault)
{
	unsigned long nr = gfn - slot->base_gfn;
	const unsigned long __user *at = slot->userfault_bitmap + BIT_WORD(nr);
	unsigned long word;

	if (nofault ? copy_from_user_nofault(&word, at, sizeof(word))
		    : get_user(word, at))
		return hva;

	if (word & BIT_MASK(nr))
		return hva;

	/* As for vCPUs, see kvm_userfault_bit_acquire() */
	smp_acquire__after_ctrl_dep();
	return kvm_userfault_hva(slot, hva);
}

unsigned long kvm_userfault_own_hva(const struct kvm_memory_slot *slot,
				    gfn_t gfn, unsigned long hva)
{
	if (likely(!(slot->flags & KVM_MEM_USERFAULT_ADDR)))
		return hva;

	return kvm_userfault_choose_hva(slot, gfn, hva, false);
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_userfault_own_hva);

unsigned long kvm_userfault_own_hva_nofault(const struct kvm_memory_slot *slot,
					    gfn_t gfn, unsigned long hva)
{
	if (likely(!(slot->flags & KVM_MEM_USERFAULT_ADDR)))
		return hva;

	return kvm_userfault_choose_hva(slot, gfn, hva, true);
}
