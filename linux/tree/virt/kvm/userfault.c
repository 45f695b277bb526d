// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM Userfault: trap vCPU accesses to the pages of a memslot whose bit is
 * set in a bitmap that userspace owns.
 */
#include <linux/bits.h>
#include <linux/kvm_host.h>
#include <linux/kvm_userfault.h>
#include <linux/uaccess.h>
#include <trace/events/kvm.h>

static unsigned long __user *
kvm_userfault_bitmap(const struct kvm_userspace_memory_region2 *mem)
{
	return u64_to_user_ptr(mem->userfault_bitmap);
}

int kvm_userfault_check_region(const struct kvm_userspace_memory_region2 *mem,
			       const struct kvm_memory_slot *old)
{
	unsigned long npages = mem->memory_size >> PAGE_SHIFT;
	unsigned long bytes = BITS_TO_LONGS(npages) * sizeof(unsigned long);
	unsigned long bitmap = mem->userfault_bitmap;

	if (!(mem->flags & KVM_MEM_USERFAULT))
		return 0;

	if (!bitmap || mem->userfault_bitmap != bitmap ||
	    mem->userfault_bitmap != untagged_addr(mem->userfault_bitmap) ||
	    !IS_ALIGNED(bitmap, sizeof(unsigned long)))
		return -EINVAL;

	if (!access_ok(kvm_userfault_bitmap(mem), bytes))
		return -EINVAL;

	/*
	 * vCPUs use the bitmap without a lock.  Replacing it under them would
	 * leave userspace unable to tell which of the two they go by.
	 */
	if (kvm_slot_has_userfault(old) &&
	    old->userfault_bitmap != kvm_userfault_bitmap(mem))
		return -EINVAL;

	return 0;
}

void kvm_userfault_init_slot(struct kvm_memory_slot *new,
			     const struct kvm_userspace_memory_region2 *mem)
{
	if (new->flags & KVM_MEM_USERFAULT)
		new->userfault_bitmap = kvm_userfault_bitmap(mem);
}

/*
 * Read the userfault bit of @gfn: 1 if it is set, 0 if it is clear, -EFAULT
 * if the bitmap cannot be read.
 *
 * A clear bit promises that the contents of the page are in place: userspace
 * fills the page, then clears the bit with a store-release.  This is the
 * acquire that pairs with it.  It orders the bit before KVM's look-up of the
 * page in the host's page tables, and so before everything that the guest
 * reads through the mapping.  A set bit needs no ordering: the vCPU exits.
 */
static int kvm_userfault_bit_acquire(const struct kvm_memory_slot *slot,
				     gfn_t gfn)
{
	unsigned long nr = gfn - slot->base_gfn;
	unsigned long word;

	if (get_user(word, slot->userfault_bitmap + BIT_WORD(nr)))
		return -EFAULT;

	if (word & BIT_MASK(nr))
		return 1;

	smp_acquire__after_ctrl_dep();
	return 0;
}

int kvm_userfault_faultin(struct kvm_vcpu *vcpu,
			  const struct kvm_memory_slot *slot, gfn_t gfn,
			  bool is_private, bool prefetch)
{
	int r;

	if (likely(!kvm_slot_has_userfault(slot)))
		return 0;

	r = kvm_userfault_bit_acquire(slot, gfn);
	if (r <= 0)
		return r;

	/* Nobody waits for a prefetched page, there is nothing to exit from. */
	if (prefetch)
		return -EFAULT;

	kvm_prepare_memory_fault_exit(vcpu, gfn_to_gpa(gfn), PAGE_SIZE,
				      false, false, is_private);
	vcpu->run->memory_fault.flags |= KVM_MEMORY_EXIT_FLAG_USERFAULT;
	vcpu->stat.generic.userfault_exits++;
	trace_kvm_userfault(vcpu->vcpu_id, gfn_to_gpa(gfn), is_private);

	return -EFAULT;
}
