// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pagecheck: init of a small guest that knows what its memory must hold.
 *
 * One thread per vCPU reads and rewrites pages of a test memory at random and
 * verifies each page whenever it touches it. Every word of a page follows from
 * the page's number and a sequence number that grows with every write:
 *
 *	word 0		page number
 *	word 1		sequence number
 *	words 2..510	mix(page, sequence, index)
 *	word 511	sum of all the others
 *
 * What this detects: a page that is torn, zeroed, misplaced or damaged, by its
 * own words; a page that is old but whole ("stale"), because the sequence
 * number expected of it stands in a second table. That table is guest memory
 * and migrates as well: a page and its table entry that went back in time
 * together agree with each other. For that, every thread counts its writes,
 * and all sequence numbers must add up to all writes ("lost" in the report,
 * after "verify"). Memory that went back as a whole can only be seen from
 * outside: "writes" in the reports must never decrease.
 *
 * A disk, /dev/vda, is treated likewise (disk.c), and who connects to TCP port 7
 * gets back what it sends (echo.c).
 *
 * Reports are JSON lines on the virtio-serial port "guest", every 100 ms;
 * commands are read from it, a word a line: verify, run, quit.
 * Kernel command line: pagecheck.mib=N, the size of the test memory.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "pagecheck.h"

#define LAST_WORD	(PAGE_WORDS - 1)
#define REPORT_MS	100
#define MAX_WRONG	16

/* What is expected of one page, and who may touch it now. */
struct page_state {
	atomic_bool	busy;		/* one thread has the page to itself */
	uint64_t	sequence;	/* under busy */
};

/* One per vCPU, each in a cache line of its own. */
struct worker {
	pthread_t	thread;
	unsigned int	cpu;
	uint64_t	random;
	atomic_ulong	operations;
	atomic_ulong	writes;
} __attribute__((aligned(64)));

static uint64_t (*memory)[PAGE_WORDS];
static struct page_state *states;
static struct worker *workers;
static unsigned long nr_pages;
static unsigned int nr_workers;

static int port;
static atomic_bool stopping;
static bool running;

static pthread_mutex_t wrong_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long wrong_pages[MAX_WRONG];	/* under wrong_lock */
static const char *wrong_reasons[MAX_WRONG];	/* under wrong_lock */
static unsigned long nr_wrong;			/* under wrong_lock */

void die(const char *what)
{
	printf("pagecheck: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	/* Init returning is a panic, which whoever started the guest sees. */
	exit(1);
}

/* The start of a page's words; neighbours in number or sequence are far apart. */
static uint64_t mix(uint64_t page, uint64_t sequence)
{
	return (page + 1) * 0x9e3779b97f4a7c15ull ^
	       (sequence + 1) * 0xc2b2ae3d27d4eb4full;
}

void make_page(uint64_t *words, uint64_t number, uint64_t sequence)
{
	uint64_t value = mix(number, sequence);
	uint64_t sum = number + sequence;

	words[0] = number;
	words[1] = sequence;
	for (unsigned int i = 2; i < LAST_WORD; i++) {
		value += 0xd1342543de82ef95ull;
		words[i] = value;
		sum += value;
	}
	words[LAST_WORD] = sum;
}

const char *check_page(const uint64_t *words, uint64_t number, uint64_t sequence)
{
	uint64_t value = mix(words[0], words[1]);
	uint64_t sum = words[0] + words[1];
	uint64_t differ = 0;

	for (unsigned int i = 2; i < LAST_WORD; i++) {
		value += 0xd1342543de82ef95ull;
		differ |= words[i] ^ value;
		sum += words[i];
	}
	if (differ || sum != words[LAST_WORD])
		return "damaged";
	if (words[0] != number)
		return "misplaced";
	if (words[1] != sequence)
		return words[1] < sequence ? "stale" : "too new";
	return NULL;
}

/* Counts a wrong page and makes it right again, so that it counts once. */
static void repair_page(unsigned long page, const char *reason)
{
	pthread_mutex_lock(&wrong_lock);
	if (nr_wrong < MAX_WRONG) {
		wrong_pages[nr_wrong] = page;
		wrong_reasons[nr_wrong] = reason;
	}
	nr_wrong++;
	pthread_mutex_unlock(&wrong_lock);
	make_page(memory[page], page, states[page].sequence);
}

static uint64_t next_random(struct worker *worker)
{
	worker->random ^= worker->random << 13;
	worker->random ^= worker->random >> 7;
	worker->random ^= worker->random << 17;
	return worker->random;
}

/* One operation: verify a page, and rewrite it every other time. */
static void touch_page(struct worker *worker)
{
	uint64_t random = next_random(worker);
	unsigned long page = (random >> 8) % nr_pages;
	struct page_state *state = &states[page];
	const char *reason;

	if (atomic_exchange_explicit(&state->busy, true, memory_order_acquire))
		return;		/* somebody else's: try another page */

	reason = check_page(memory[page], page, state->sequence);
	if (reason)
		repair_page(page, reason);
	if (random & 1) {
		make_page(memory[page], page, ++state->sequence);
		atomic_fetch_add(&worker->writes, 1);
	}
	atomic_store_explicit(&state->busy, false, memory_order_release);
	atomic_fetch_add(&worker->operations, 1);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(worker->cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		die("sched_setaffinity");
	while (!atomic_load_explicit(&stopping, memory_order_relaxed))
		touch_page(worker);
	return NULL;
}

static void start_workers(void)
{
	if (running)
		return;
	atomic_store(&stopping, false);
	for (unsigned int i = 0; i < nr_workers; i++) {
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			die("pthread_create");
	}
	running = true;
}

static void stop_workers(void)
{
	if (!running)
		return;
	atomic_store(&stopping, true);
	for (unsigned int i = 0; i < nr_workers; i++)
		pthread_join(workers[i].thread, NULL);
	running = false;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* Sends one line; the format ends without a newline. */
__attribute__((format(printf, 1, 2)))
static void send_line(const char *format, ...)
{
	char line[2048];
	size_t length, sent = 0;
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	strcat(line, "\n");
	length = strlen(line);
	while (sent < length) {
		ssize_t count = write(port, line + sent, length - sent);

		if (count > 0)
			sent += count;
		else if (errno == EAGAIN)
			usleep(1000);
		else
			die("write to the port");
	}
}

/* The wrong pages known so far, as the inside of a JSON list. */
static unsigned long list_wrong(char *text, size_t size)
{
	size_t used = 0;
	unsigned long count;

	text[0] = '\0';
	pthread_mutex_lock(&wrong_lock);
	count = nr_wrong;
	for (unsigned long i = 0; i < count && i < MAX_WRONG; i++)
		used += snprintf(text + used, size - used,
				 "%s{\"page\":%lu,\"why\":\"%s\"}",
				 i ? "," : "", wrong_pages[i],
				 wrong_reasons[i]);
	pthread_mutex_unlock(&wrong_lock);
	return count;
}

static void report(const char *event, const char *more)
{
	unsigned long operations = 0, writes = 0, wrong;
	char list[MAX_WRONG * 64];

	for (unsigned int i = 0; i < nr_workers; i++) {
		operations += atomic_load(&workers[i].operations);
		writes += atomic_load(&workers[i].writes);
	}
	wrong = list_wrong(list, sizeof(list));
	send_line("{\"event\":\"%s\",\"ns\":%llu,\"operations\":%lu,\"writes\":%lu,\"wrong\":%lu,\"wrong_pages\":[%s]%s}",
		  event, (unsigned long long)now_ns(), operations, writes,
		  wrong, list, more);
}

/* Checks every page while nobody works, and that no write is lost. */
static void verify(void)
{
	uint64_t sequences = 0, writes = 0;
	unsigned long wrong = 0, blocks, wrong_blocks;
	const char *reason;
	char more[256];

	stop_workers();
	for (unsigned long page = 0; page < nr_pages; page++) {
		reason = check_page(memory[page], page, states[page].sequence);
		if (reason) {
			repair_page(page, reason);
			wrong++;
		}
		sequences += states[page].sequence;
	}
	for (unsigned int i = 0; i < nr_workers; i++)
		writes += atomic_load(&workers[i].writes);
	blocks = disk_verify(&wrong_blocks);
	snprintf(more, sizeof(more),
		 ",\"pages\":%lu,\"wrong_now\":%lu,\"lost\":%lld,\"blocks\":%lu,\"wrong_blocks\":%lu",
		 nr_pages, wrong, (long long)(writes - sequences), blocks,
		 wrong_blocks);
	report("verified", more);
}

static void obey(const char *command)
{
	if (!strcmp(command, "verify")) {
		verify();
	} else if (!strcmp(command, "run")) {
		start_workers();
	} else if (!strcmp(command, "quit")) {
		report("quit", "");
		reboot(RB_POWER_OFF);
	}
}

/* Reads what has arrived and obeys every whole line of it. */
static void read_commands(void)
{
	static char line[64];
	static size_t length;
	char c;

	while (read(port, &c, 1) == 1) {
		if (c != '\n') {
			if (length < sizeof(line) - 1)
				line[length++] = c;
			continue;
		}
		line[length] = '\0';
		length = 0;
		obey(line);
	}
}

/* Finds the device whose name is "guest": nobody makes links for us. */
static int open_port(void)
{
	const char *base = "/sys/class/virtio-ports";
	char path[512], name[32] = "";
	struct dirent *entry;
	DIR *dir = opendir(base);

	if (!dir)
		die(base);
	while ((entry = readdir(dir))) {
		FILE *file;

		snprintf(path, sizeof(path), "%s/%s/name", base, entry->d_name);
		file = fopen(path, "r");
		if (!file)
			continue;
		if (fscanf(file, "%31s", name) == 1 && !strcmp(name, "guest")) {
			fclose(file);
			snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
			closedir(dir);
			return open(path, O_RDWR | O_NONBLOCK);
		}
		fclose(file);
	}
	closedir(dir);
	errno = ENODEV;
	return -1;
}

static void mount_all(void)
{
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	if (mount("dev", "/dev", "devtmpfs", 0, "") && errno != EBUSY)
		die("mount /dev");
	if (mount("proc", "/proc", "proc", 0, "") ||
	    mount("sys", "/sys", "sysfs", 0, ""))
		die("mount");
	/* There was no /dev/console when the kernel started us. */
	if (!freopen("/dev/console", "w", stdout))
		exit(1);
}

static unsigned long wanted_mib(void)
{
	char line[2048] = "";
	const char *option;
	FILE *file = fopen("/proc/cmdline", "r");

	if (!file || !fgets(line, sizeof(line), file))
		die("/proc/cmdline");
	fclose(file);
	option = strstr(line, "pagecheck.mib=");
	return option ? strtoul(strchr(option, '=') + 1, NULL, 10) : 64;
}

static void fill_memory(void)
{
	nr_pages = wanted_mib() * ((1 << 20) / PAGE_BYTES);
	memory = mmap(NULL, nr_pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	states = calloc(nr_pages, sizeof(*states));
	if (memory == MAP_FAILED || !states)
		die("test memory");
	for (unsigned long page = 0; page < nr_pages; page++)
		make_page(memory[page], page, 0);
}

static void make_workers(void)
{
	nr_workers = sysconf(_SC_NPROCESSORS_ONLN);
	workers = aligned_alloc(64, nr_workers * sizeof(*workers));
	if (!workers)
		die("workers");
	memset(workers, 0, nr_workers * sizeof(*workers));
	for (unsigned int i = 0; i < nr_workers; i++) {
		workers[i].cpu = i;
		workers[i].random = mix(i, now_ns());
	}
}

int main(void)
{
	char more[64];

	mount_all();
	port = open_port();
	if (port < 0)
		die("virtio-serial port \"guest\"");
	make_workers();
	fill_memory();
	disk_start();
	echo_start();
	snprintf(more, sizeof(more), ",\"pages\":%lu,\"vcpus\":%u", nr_pages,
		 nr_workers);
	report("filled", more);
	start_workers();
	for (;;) {
		struct pollfd wait = { .fd = port, .events = POLLIN };

		poll(&wait, 1, REPORT_MS);
		if (wait.revents & POLLIN)
			read_commands();
		else if (running)
			report("working", "");
		if (wait.revents & POLLHUP)	/* poll() does not wait then */
			usleep(REPORT_MS * 1000);
	}
}
