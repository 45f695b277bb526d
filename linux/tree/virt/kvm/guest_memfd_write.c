// SPDX-License-Identifier: GPL-2.0
/*
 * write() on a guest_memfd: put contents into guest memory without a mapping of
 * it, e.g. to restore or to migrate a VM.
 *
 * Only memory that is shared with the host can be written, and a page is filled
 * once: a copy that comes late can't overwrite what the guest has written since.
 * A folio is filled before it is added to the page cache.  So nobody sees one
 * that is filled in part, and whoever adds it first wins.
 */
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/pagemap.h>
#include <linux/uio.h>

#include "guest_memfd.h"

/*
 * Move the contents of @src to a folio that was allocated, but not filled, at
 * @index.  Returns -EEXIST if it was filled, -EHWPOISON if it is broken.
 */
static int kvm_gmem_fill_allocated(struct inode *inode, pgoff_t index,
				   struct folio *src)
{
	struct folio *folio = filemap_lock_folio(inode->i_mapping, index);
	int ret = -EEXIST;

	/* It was there a moment ago, a hole may have been punched since. */
	if (IS_ERR(folio))
		return -EAGAIN;

	if (folio_test_hwpoison(folio)) {
		ret = -EHWPOISON;
	} else if (!folio_test_uptodate(folio)) {
		copy_highpage(folio_page(folio, 0), folio_page(src, 0));
		folio_mark_uptodate(folio);
		ret = 0;
	}

	folio_unlock(folio);
	folio_put(folio);
	return ret;
}

/* Write one page.  The source may be any memory, even a mapping of @inode. */
static int kvm_gmem_write_page(struct inode *inode, pgoff_t index,
			       struct iov_iter *from)
{
	struct folio *folio;
	size_t copied;
	int ret;

	if (!kvm_gmem_is_shared_mem(inode, index))
		return -EPERM;

	/*
	 * Don't copy in vain, though only adding it to the cache can tell.  One
	 * that is locked may be taken out again: UFFDIO_COPY does if it can't map
	 * what it has added.
	 */
	folio = filemap_get_folio(inode->i_mapping, index);
	if (!IS_ERR(folio)) {
		bool filled = !folio_test_locked(folio) &&
			      folio_test_uptodate(folio) &&
			      !folio_test_hwpoison(folio);

		folio_put(folio);
		if (filled)
			return -EEXIST;
	}

	folio = kvm_gmem_alloc_folio(inode, index);
	if (!folio)
		return -ENOMEM;

	copied = copy_folio_from_iter(folio, 0, PAGE_SIZE, from);
	if (copied != PAGE_SIZE) {
		iov_iter_revert(from, copied);
		ret = -EFAULT;
		goto out;
	}
	__folio_mark_uptodate(folio);

	do {
		ret = filemap_add_folio(inode->i_mapping, folio, index,
					mapping_gfp_mask(inode->i_mapping));
		if (!ret)
			folio_unlock(folio);
		else if (ret == -EEXIST)
			ret = kvm_gmem_fill_allocated(inode, index, folio);
	} while (ret == -EAGAIN);

	if (ret)
		iov_iter_revert(from, PAGE_SIZE);
out:
	folio_put(folio);
	return ret;
}

/*
 * Fill pages that have not been filled yet.  Returns the number of bytes
 * written, which is less than was asked for if there was an error after the
 * first page.
 */
ssize_t kvm_gmem_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	loff_t size = i_size_read(inode);
	ssize_t written = 0;
	int ret = 0;

	if (!kvm_gmem_supports_write(inode))
		return -ENODEV;

	/* The file does not grow, so there is nothing to append to. */
	if (iocb->ki_flags & IOCB_APPEND)
		return -EINVAL;

	if (!PAGE_ALIGNED(iocb->ki_pos) || !PAGE_ALIGNED(iov_iter_count(from)))
		return -EINVAL;

	if (iocb->ki_pos < 0 || iocb->ki_pos > size ||
	    iov_iter_count(from) > size - iocb->ki_pos)
		return -EINVAL;

	while (iov_iter_count(from)) {
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}

		ret = kvm_gmem_write_page(inode, iocb->ki_pos >> PAGE_SHIFT,
					  from);
		if (ret)
			break;

		iocb->ki_pos += PAGE_SIZE;
		written += PAGE_SIZE;
		cond_resched();
	}

	if (written)
		file_modified(iocb->ki_filp);
	return written ?: ret;
}
