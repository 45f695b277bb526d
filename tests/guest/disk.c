// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The disk, in blocks that are like the pages of the test memory: each knows its
 * number and how often it was written. How often that is, the guest remembers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "pagecheck.h"

#define DISK		"/dev/vda"
#define FILL_BLOCKS	16		/* of one write, when it is filled */
#define PAUSE_US	2000		/* between two blocks */

static int disk = -1;
static unsigned long nr_blocks;
static unsigned long nr_wrong;		/* found at work; under disk_lock */
static uint64_t *sequences;		/* of each block; under disk_lock */
static uint64_t (*buffer)[PAGE_WORDS];	/* under disk_lock */
static pthread_mutex_t disk_lock = PTHREAD_MUTEX_INITIALIZER;

static void write_blocks(unsigned long first, unsigned long count)
{
	ssize_t size = count * PAGE_BYTES;

	if (pwrite(disk, buffer, size, first * PAGE_BYTES) != size)
		die("write to " DISK);
}

static bool block_is_wrong(unsigned long block)
{
	if (pread(disk, buffer, PAGE_BYTES, block * PAGE_BYTES) != PAGE_BYTES)
		die("read from " DISK);
	return check_page(buffer[0], block, sequences[block]);
}

static void *work_on_disk(void *unused)
{
	unsigned int random = 1;

	(void)unused;
	for (;;) {
		unsigned long block = rand_r(&random) % nr_blocks;

		pthread_mutex_lock(&disk_lock);
		if (block_is_wrong(block))
			nr_wrong++;
		make_page(buffer[0], block, ++sequences[block]);
		write_blocks(block, 1);
		pthread_mutex_unlock(&disk_lock);
		usleep(PAUSE_US);
	}
	return NULL;
}

void disk_start(void)
{
	uint64_t size;
	pthread_t thread;

	disk = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (disk < 0 && errno == ENOENT)
		return;
	if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size))
		die(DISK);
	nr_blocks = size / PAGE_BYTES / FILL_BLOCKS * FILL_BLOCKS;
	sequences = calloc(nr_blocks, sizeof(*sequences));
	buffer = aligned_alloc(PAGE_BYTES, FILL_BLOCKS * PAGE_BYTES);
	if (!nr_blocks || !sequences || !buffer)
		die("blocks of " DISK);
	for (unsigned long block = 0; block < nr_blocks; block += FILL_BLOCKS) {
		for (unsigned long i = 0; i < FILL_BLOCKS; i++)
			make_page(buffer[i], block + i, 0);
		write_blocks(block, FILL_BLOCKS);
	}
	if (pthread_create(&thread, NULL, work_on_disk, NULL))
		die("pthread_create");
}

unsigned long disk_verify(unsigned long *wrong)
{
	pthread_mutex_lock(&disk_lock);
	*wrong = nr_wrong;
	nr_wrong = 0;
	for (unsigned long block = 0; block < nr_blocks; block++)
		*wrong += block_is_wrong(block);
	pthread_mutex_unlock(&disk_lock);
	return nr_blocks;
}
