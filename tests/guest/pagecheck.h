/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of pagecheck share; see pagecheck.c. */
#ifndef PAGECHECK_H
#define PAGECHECK_H

#include <stdint.h>

#define PAGE_BYTES	4096
#define PAGE_WORDS	(PAGE_BYTES / sizeof(uint64_t))

/* Makes a page the one that has this number, as it is after so many writes. */
void make_page(uint64_t *words, uint64_t number, uint64_t sequence);

/* What is wrong with a page that should be that one; NULL if nothing is. */
const char *check_page(const uint64_t *words, uint64_t number, uint64_t sequence);

/* Says what failed, and why (errno), and ends the guest with a panic. */
void die(const char *what) __attribute__((noreturn));

/*
 * The guest's disk, if it has one. A thread writes and reads its blocks while
 * the guest works, past the page cache.
 */
void disk_start(void);

/*
 * Reads all of it, while that thread waits, and counts the blocks that are wrong,
 * or were so since the last time. Returns the number of blocks, 0 without a disk.
 */
unsigned long disk_verify(unsigned long *wrong);

/* Answers each client of TCP port 7 with what it sends (RFC 862). */
void echo_start(void);

#endif
