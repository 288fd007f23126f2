/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A shard of the index: making room in its lines, and letting it grow.  The
 * terms, and what may go wrong, are explained in index.c.
 *
 * Lines are numbered from the first one of the shard, and @lines or @pages is
 * how many it has, as the caller has read it: it may have more by now.
 *
 * Threads: any, of any process.
 */

#ifndef DEDUP_INDEX_SHARD_H
#define DEDUP_INDEX_SHARD_H

#include <stdbool.h>
#include <stdint.h>

#include "index/index.h"

/*
 * Put @entry in the place of one that is no published hint, beginning at a
 * place that @seed chooses.  False: all are published.
 */
bool dedup_line_replace(uint64_t *line, uint64_t entry, unsigned seed);

/*
 * Put @entry in line @at, which is full: one of the entries there moves to the
 * other line where it may be.  False: no room there either, or no memory.
 */
bool dedup_line_displace(const DedupIndex *index, unsigned shard,
                         uint64_t at, uint64_t lines, uint64_t entry);

/* Should @shard grow, and may it? */
bool dedup_shard_overloaded(const DedupIndex *index, unsigned shard,
                            uint64_t pages);

/* Correct the count of entries by a sample of lines that @tag chooses. */
void dedup_shard_check_count(const DedupIndex *index, unsigned shard,
                             uint64_t pages, uint32_t tag);

/*
 * Let @shard grow, by us or by somebody else.  False: it has no more than
 * @pages pages and cannot: the limit, or no memory.
 */
bool dedup_shard_grow(const DedupIndex *index, unsigned shard,
                      uint64_t pages);

#endif /* DEDUP_INDEX_SHARD_H */
