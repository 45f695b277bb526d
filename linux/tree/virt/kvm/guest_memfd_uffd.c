// SPDX-License-Identifier: GPL-2.0
/*
 * userfaultfd on mappings of a guest_memfd: MISSING and MINOR, of memory that is
 * shared with the host.
 *
 * It catches what goes through a mapping, i.e. userspace, and KVM's own accesses.
 * vCPUs get their pages straight from the file, KVM Userfault catches those.
 */
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/pagemap.h>
#include <linux/userfaultfd_k.h>

#include "guest_memfd.h"

/*
 * Clear a folio that was allocated, but not filled, e.g. by fallocate(), unless
 * it is broken, which callers see for themselves.
 */
static void kvm_gmem_make_uptodate(struct folio *folio)
{
	if (folio_test_uptodate(folio) || folio_test_hwpoison(folio))
		return;

	clear_highpage(folio_page(folio, 0));
	folio_mark_uptodate(folio);
}

/*
 * Let userfaultfd have the fault if it wants to, else return the folio in
 * @foliop, locked and with a reference, as kvm_gmem_get_folio() does.
 *
 * A page that was never allocated doesn't raise a MINOR fault: to see all first
 * accesses, a range has to be registered for MISSING as well.
 */
vm_fault_t kvm_gmem_handle_userfault(struct vm_fault *vmf,
				     struct folio **foliop)
{
	struct vm_area_struct *vma = vmf->vma;
	struct inode *inode = file_inode(vma->vm_file);
	struct folio *folio;
	int err;

retry:
	folio = filemap_lock_folio(inode->i_mapping, vmf->pgoff);
	if (!IS_ERR(folio)) {
		if (userfaultfd_minor(vma)) {
			folio_unlock(folio);
			folio_put(folio);
			return handle_userfault(vmf, VM_UFFD_MINOR);
		}
		*foliop = folio;
		return 0;
	}

	if (userfaultfd_missing(vma))
		return handle_userfault(vmf, VM_UFFD_MISSING);

	/*
	 * Adding the folio here, and not by kvm_gmem_get_folio(), tells it from
	 * one that somebody else has added meanwhile.
	 */
	folio = kvm_gmem_alloc_folio(inode, vmf->pgoff);
	if (!folio)
		return VM_FAULT_OOM;

	err = filemap_add_folio(inode->i_mapping, folio, vmf->pgoff,
				mapping_gfp_mask(inode->i_mapping));
	if (err) {
		folio_put(folio);
		if (err == -EEXIST)
			goto retry;
		return vmf_error(err);
	}

	*foliop = folio;
	return 0;
}

/*
 * Private memory can't be mapped, there are no faults to handle.  Registering it
 * for asynchronous write protection is not up to us, which is why the operations
 * that fill pages have to refuse it, too.
 */
static bool kvm_gmem_can_userfault(struct vm_area_struct *vma,
				   vm_flags_t vm_flags)
{
	return !(vm_flags & ~(VM_UFFD_MISSING | VM_UFFD_MINOR)) &&
	       kvm_gmem_is_shared_mem(file_inode(vma->vm_file),
				      vma_start_pgoff(vma));
}

static struct folio *kvm_gmem_get_folio_noalloc(struct inode *inode,
						pgoff_t pgoff)
{
	struct folio *folio;

	if (!kvm_gmem_is_shared_mem(inode, pgoff))
		return ERR_PTR(-EPERM);

	folio = filemap_lock_folio(inode->i_mapping, pgoff);
	if (!IS_ERR(folio))
		kvm_gmem_make_uptodate(folio);

	return folio;
}

static struct folio *kvm_gmem_mfill_folio_alloc(struct vm_area_struct *vma,
						unsigned long addr)
{
	return kvm_gmem_alloc_folio(file_inode(vma->vm_file),
				    linear_page_index(vma, addr));
}

/*
 * Drop the folio at @pgoff if it was allocated, but not filled: nobody has mapped
 * such a one.  Returns whether there is none now.
 */
static bool kvm_gmem_drop_allocated(struct inode *inode, pgoff_t pgoff)
{
	struct folio *folio = filemap_lock_folio(inode->i_mapping, pgoff);
	bool dropped;

	if (IS_ERR(folio))
		return true;

	dropped = !folio_test_uptodate(folio) && !folio_test_hwpoison(folio);
	if (dropped)
		filemap_remove_folio(folio);

	folio_unlock(folio);
	folio_put(folio);
	return dropped;
}

static int kvm_gmem_mfill_filemap_add(struct folio *folio,
				      struct vm_area_struct *vma,
				      unsigned long addr)
{
	struct inode *inode = file_inode(vma->vm_file);
	pgoff_t pgoff = linear_page_index(vma, addr);
	int ret;

	if (!kvm_gmem_is_shared_mem(inode, pgoff))
		return -EPERM;

	if (((loff_t)pgoff << PAGE_SHIFT) >= i_size_read(inode))
		return -EFAULT;

	/* -EEXIST says that the page is filled, and nothing less. */
	do {
		ret = filemap_add_folio(inode->i_mapping, folio, pgoff,
					mapping_gfp_mask(inode->i_mapping));
	} while (ret == -EEXIST && kvm_gmem_drop_allocated(inode, pgoff));

	return ret;
}

/*
 * The folio has been locked since it was added, so that neither a vCPU nor
 * another mapping can have got hold of it.
 */
static void kvm_gmem_mfill_filemap_remove(struct folio *folio,
					  struct vm_area_struct *vma)
{
	filemap_remove_folio(folio);
	folio_unlock(folio);
}

const struct vm_uffd_ops kvm_gmem_uffd_ops = {
	.can_userfault		= kvm_gmem_can_userfault,
	.get_folio_noalloc	= kvm_gmem_get_folio_noalloc,
	.alloc_folio		= kvm_gmem_mfill_folio_alloc,
	.filemap_add		= kvm_gmem_mfill_filemap_add,
	.filemap_remove		= kvm_gmem_mfill_filemap_remove,
};
