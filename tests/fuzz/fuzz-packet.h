/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Packets of the group's protocol as an enemy sends them.
 */

#ifndef FUZZ_PACKET_H
#define FUZZ_PACKET_H

#include <stddef.h>

/* The most descriptors that the kernel takes with one packet. */
#define FUZZ_FDS_MOST 253

/* Whether it gets there is the kernel's affair.  @fds stay the caller's. */
void fuzz_send(int sock, const void *data, size_t size, const int *fds,
               unsigned nfds);

#endif /* FUZZ_PACKET_H */
