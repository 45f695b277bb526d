/*
 * QTest migration helpers: a connection that can be broken in many ways
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_RELAY_H
#define MIGRATION_RELAY_H

/* Stands between the two sides and hands on what each sends to the other. */
typedef struct MigrationRelay MigrationRelay;

/**
 * migration_relay_new: make a connection
 * @source: set to the socket for the source, which the caller owns
 * @destination: set to the one for the destination, likewise
 *
 * Returns: the relay, to be ended by migration_relay_cut()
 */
MigrationRelay *migration_relay_new(int *source, int *destination);

/**
 * migration_relay_join: make a connection of two
 * @source: a socket that the source is connected to
 * @destination: a socket that is connected to the destination
 *
 * Returns: the relay, which owns the sockets
 */
MigrationRelay *migration_relay_join(int source, int destination);

/**
 * migration_relay_drop_pages: what the source sends gets lost from now on
 * @relay: the relay
 */
void migration_relay_drop_pages(MigrationRelay *relay);

/**
 * migration_relay_drop_answers: what the destination sends gets lost, too
 * @relay: the relay
 */
void migration_relay_drop_answers(MigrationRelay *relay);

/**
 * migration_relay_dropped: how much was lost, in both directions
 * @relay: the relay
 *
 * Returns: the number of bytes
 */
uint64_t migration_relay_dropped(MigrationRelay *relay);

/**
 * migration_relay_cut: close the connection to both sides
 * @relay: the relay, freed thereafter
 */
void migration_relay_cut(MigrationRelay *relay);

#endif /* MIGRATION_RELAY_H */
