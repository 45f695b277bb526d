/*
 * QTest migration helpers: a connection that can be broken in many ways
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/sockets.h"
#include "qemu/thread.h"
#include "migration/migration-relay.h"

/* What one side sends.  The thread owns neither of the sockets. */
typedef struct Direction {
    QemuThread thread;
    int from;
    int to;
    bool drop;
    size_t dropped;
} Direction;

struct MigrationRelay {
    Direction pages;
    Direction answers;
};

static bool send_all(int fd, const char *buf, size_t len)
{
    while (len) {
        ssize_t ret = send(fd, buf, len, MSG_NOSIGNAL);

        if (ret < 0) {
            return false;
        }
        buf += ret;
        len -= ret;
    }
    return true;
}

static void *relay_run(void *opaque)
{
    Direction *d = opaque;
    char buf[64 * 1024];
    ssize_t len;

    while ((len = read(d->from, buf, sizeof(buf))) > 0) {
        if (qatomic_read(&d->drop)) {
            qatomic_set(&d->dropped, d->dropped + len);
        } else if (!send_all(d->to, buf, len)) {
            break;
        }
    }
    /* If one side has ended the connection, so it is for the other. */
    shutdown(d->from, SHUT_RDWR);
    shutdown(d->to, SHUT_RDWR);
    return NULL;
}

static void relay_start(Direction *d, const char *name, int from, int to)
{
    d->from = from;
    d->to = to;
    qemu_thread_create(&d->thread, name, relay_run, d, QEMU_THREAD_JOINABLE);
}

MigrationRelay *migration_relay_join(int source, int destination)
{
    MigrationRelay *relay = g_new0(MigrationRelay, 1);

    relay_start(&relay->pages, "relay-pages", source, destination);
    relay_start(&relay->answers, "relay-answers", destination, source);
    return relay;
}

MigrationRelay *migration_relay_new(int *source, int *destination)
{
    int a[2], b[2];
    int ret;

    ret = qemu_socketpair(PF_LOCAL, SOCK_STREAM, 0, a);
    g_assert_cmpint(ret, ==, 0);
    ret = qemu_socketpair(PF_LOCAL, SOCK_STREAM, 0, b);
    g_assert_cmpint(ret, ==, 0);
    *source = a[0];
    *destination = b[0];
    return migration_relay_join(a[1], b[1]);
}

void migration_relay_drop_pages(MigrationRelay *relay)
{
    qatomic_set(&relay->pages.drop, true);
}

void migration_relay_drop_answers(MigrationRelay *relay)
{
    qatomic_set(&relay->answers.drop, true);
}

uint64_t migration_relay_dropped(MigrationRelay *relay)
{
    return qatomic_read(&relay->pages.dropped) +
           qatomic_read(&relay->answers.dropped);
}

void migration_relay_cut(MigrationRelay *relay)
{
    /* Ends both threads, whatever they wait for */
    shutdown(relay->pages.from, SHUT_RDWR);
    shutdown(relay->pages.to, SHUT_RDWR);
    qemu_thread_join(&relay->pages.thread);
    qemu_thread_join(&relay->answers.thread);
    close(relay->pages.from);
    close(relay->pages.to);
    g_free(relay);
}
