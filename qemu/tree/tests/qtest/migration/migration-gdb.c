/*
 * QTest migration helpers: a debugger at a guest
 *
 * The packets are those of gdb's documentation, "Remote Serial Protocol".
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/sockets.h"
#include "migration/framework.h"
#include "migration/migration-gdb.h"

static void gdb_server(QTestState *who, const char *device)
{
    g_autofree char *command = g_strdup_printf("gdbserver %s", device);

    qtest_qmp_assert_success(who, "{ 'execute': 'human-monitor-command',"
                             "  'arguments': { 'command-line': %s } }",
                             command);
}

int gdb_attach(QTestState *who)
{
    g_autofree char *path = g_strdup_printf("%s/gdb",
                                            migration_get_env()->tmpfs);
    g_autofree char *device = g_strdup_printf("unix:%s,server=on,wait=off",
                                              path);
    int fd;

    gdb_server(who, device);
    fd = unix_connect(path, &error_abort);
    unlink(path);
    return fd;
}

void gdb_ask(int fd, const char *data)
{
    g_autofree char *packet = NULL;
    char answer[4096];
    uint8_t sum = 0;
    size_t len;

    for (len = 0; data[len]; len++) {
        sum += data[len];
    }
    packet = g_strdup_printf("$%s#%02x", data, sum);
    len = strlen(packet);
    g_assert_cmpint(write(fd, packet, len), ==, len);

    /* An acknowledgement, then $, what is asked for, #, and two digits */
    len = 0;
    while (len < 4 || answer[len - 3] != '#') {
        ssize_t ret = read(fd, answer + len, sizeof(answer) - 1 - len);

        g_assert_cmpint(ret, >, 0);
        len += ret;
    }
    answer[len] = 0;
    g_assert_true(g_str_has_prefix(answer, "+$"));
    g_assert_cmpint(len, >, strlen("+$#00"));
    g_assert_cmpint(write(fd, "+", 1), ==, 1);
}

void gdb_detach(QTestState *who, int fd)
{
    gdb_ask(fd, "D");
    close(fd);
    gdb_server(who, "none");
}
