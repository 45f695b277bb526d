// SPDX-License-Identifier: GPL-2.0-or-later
/* An echo server: whoever has a session to it sees when the guest stands still. */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pagecheck.h"

#define ECHO_PORT	7
#define MAX_CLIENTS	8

static struct pollfd ends[1 + MAX_CLIENTS];	/* the first one listens */
static unsigned int nr_ends = 1;

/* Returns false when the client is gone. */
static int answer(int client)
{
	char data[4096];
	ssize_t length = read(client, data, sizeof(data)), sent = 0;

	while (sent < length) {
		ssize_t count = write(client, data + sent, length - sent);

		if (count < 0)
			return 0;
		sent += count;
	}
	return length > 0;
}

static void *serve(void *unused)
{
	(void)unused;
	for (;;) {
		/* A client too many waits until another one is gone. */
		ends[0].events = nr_ends <= MAX_CLIENTS ? POLLIN : 0;
		poll(ends, nr_ends, -1);
		for (unsigned int i = nr_ends - 1; i > 0; i--) {
			if (!ends[i].revents || answer(ends[i].fd))
				continue;
			close(ends[i].fd);
			ends[i] = ends[--nr_ends];
		}
		if (ends[0].revents & POLLIN) {
			int client = accept(ends[0].fd, NULL, NULL);

			if (client >= 0)
				ends[nr_ends++] = (struct pollfd){
					.fd = client, .events = POLLIN,
				};
		}
	}
	return NULL;
}

void echo_start(void)
{
	struct sockaddr_in here = {
		.sin_family = AF_INET,
		.sin_port = htons(ECHO_PORT),
		.sin_addr.s_addr = htonl(INADDR_ANY),
	};
	pthread_t thread;

	ends[0].fd = socket(AF_INET, SOCK_STREAM, 0);
	if (ends[0].fd < 0 ||
	    bind(ends[0].fd, (struct sockaddr *)&here, sizeof(here)) ||
	    listen(ends[0].fd, MAX_CLIENTS))
		die("echo server");
	if (pthread_create(&thread, NULL, serve, NULL))
		die("pthread_create");
}
