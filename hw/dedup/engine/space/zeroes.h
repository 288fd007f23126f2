/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The segment of zeros: what zero pages are merged to where a hole in the
 * RAM's file is not safe; see zeroes.c.  Its use: space.h, holdings.h.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_ZEROES_H
#define DEDUP_ZEROES_H

#include <sys/types.h>

#include "space/space.h"

/* May the file system of the file run full?  Any thread. */
bool dedup_file_is_bounded(int fd, dev_t *dev);

/* Memory of its own: pages of it that guests have read. */
uint64_t dedup_zeroes_bytes(const DedupSpace *space);

#endif /* DEDUP_ZEROES_H */
