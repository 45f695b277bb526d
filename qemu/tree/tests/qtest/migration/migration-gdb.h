/*
 * QTest migration helpers: a debugger at a guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_GDB_H
#define MIGRATION_GDB_H

#include "libqtest.h"

/**
 * gdb_attach: start QEMU's gdbstub and connect to it, which stops the guest
 * @who: whose guest
 *
 * Returns: the connection, to be ended by gdb_detach()
 */
int gdb_attach(QTestState *who);

/**
 * gdb_ask: send a command of gdb's remote protocol, and wait for its answer
 * @fd: the connection
 * @data: the command, without the frame of a packet
 *
 * The test fails if the answer is empty, which means that the gdbstub does not
 * know the command, or longer than 4 KiB.
 */
void gdb_ask(int fd, const char *data);

/**
 * gdb_detach: let the guest go on, and end the gdbstub
 * @who: whose guest
 * @fd: the connection, closed thereafter
 */
void gdb_detach(QTestState *who, int fd);

#endif /* MIGRATION_GDB_H */
