/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The index: a table of hints "a page with this hash was seen there", in
 * memory that all members of a group share and write without a lock.
 *
 * It only hints: an entry may be stale, torn between two meanings, lost, or
 * written by an enemy.  Every number read from it is bounds-checked by who
 * uses it; the byte compare under write protection decides.  See index.c for
 * why each kind of loss is harmless.
 *
 * Threads: any, of any process; but a DedupIndex is freed by its owner when
 * nobody uses it any more.
 */

#ifndef DEDUP_INDEX_H
#define DEDUP_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct DedupIndex DedupIndex;

typedef enum DedupHintKind {
    DEDUP_HINT_NONE = 0,
    DEDUP_HINT_CANDIDATE = 1,     /* a member has it: (member, page) */
    DEDUP_HINT_PUBLISHED = 2,     /* a segment has it: (gid, page) */
    DEDUP_HINT_CLAIMED = 3,       /* a member is publishing its copy */
} DedupHintKind;

#define DEDUP_MEMBER_BITS 8       /* 256 members */
#define DEDUP_MEMBER_PAGE_BITS 30 /* 4 TiB of 4 KiB pages each */
#define DEDUP_GID_BITS 29
#define DEDUP_GID_PAGE_BITS 9     /* DEDUP_SEGMENT_PAGES */

typedef struct DedupHint {
    DedupHintKind kind;
    uint32_t where;               /* member number, or segment gid */
    uint32_t page;                /* number in the member, or the segment */
    uint64_t raw;                 /* the entry as read, for replace/remove */
} DedupHint;

#define DEDUP_INDEX_HITS 4

/* The part of the shared file's header that belongs to the index. */
typedef struct DedupIndexHeader DedupIndexHeader;

/* Bytes that the header and the (sparse) table take in the shared file. */
size_t dedup_index_header_size(void);
size_t dedup_index_table_size(void);

/*
 * A view of the index in a mapped shared file.  @fd and @table_offset are
 * used to allocate table pages before they are stored to, and to see which
 * need not be looked at (I9).  A new file is all zero: that is an empty
 * index.
 */
DedupIndex *dedup_index_new(DedupIndexHeader *header, void *table, int fd,
                            uint64_t table_offset);
void dedup_index_free(DedupIndex *index);

/*
 * The table grows for no more than about @entries; beyond that, a new hint
 * takes the place of a candidate.  Hints of pages that were rewritten since
 * stay until then, so without a limit the table of a busy group grows to its
 * maximum: set it to some multiple of the group's pages.
 *
 * This is also what bounds the memory that this process takes for the table
 * if the header is wrong: about three times what @entries need.  0: it takes
 * no more at all, and inserts only where there is memory already.  It holds
 * for this process, from the next call on; what the table has, it keeps.
 */
void dedup_index_set_limit(DedupIndex *index, uint64_t entries);

void dedup_index_prefetch(const DedupIndex *index, uint64_t hash);

/*
 * Fills @hits: published ones first, then claimed ones, then candidates, each
 * kind in ascending order of where and page.  So all members that see the
 * same entries prefer the same one.  Returns how many.
 */
unsigned dedup_index_lookup(const DedupIndex *index, uint64_t hash,
                            DedupHint hits[DEDUP_INDEX_HITS]);

/*
 * Adds a hint, growing the table if need be.  When both lines of a hash are
 * full a candidate is replaced.  Returns false if there was no room at all
 * (all entries published and the table cannot grow), or no memory.
 */
bool dedup_index_insert(DedupIndex *index, uint64_t hash,
                        const DedupHint *hint);

/* Replaces the entry that was read as @old; false if it changed meanwhile. */
bool dedup_index_replace(DedupIndex *index, uint64_t hash,
                         const DedupHint *old, const DedupHint *hint);
bool dedup_index_remove(DedupIndex *index, uint64_t hash,
                        const DedupHint *old);

/* Are the hints of two different hashes taken for one another? */
bool dedup_index_collides(uint64_t a, uint64_t b);

/*
 * Looks at the next @pages pages of the table, around and around, and removes
 * the hints that @is_stale says are.  @cursor: where the sweep is; 0 at first.
 * Returns how many were removed.  Takes no memory, and @is_stale is called
 * for 512 hints a page at most, whatever the header says.
 */
unsigned dedup_index_sweep(DedupIndex *index, uint64_t *cursor,
                           unsigned pages,
                           bool (*is_stale)(void *opaque,
                                            const DedupHint *hint),
                           void *opaque);

/* The entry that stands for a hint: what dedup_index_replace() wants. */
uint64_t dedup_index_raw(uint64_t hash, const DedupHint *hint);

/* Memory that the table takes, and how often it grew (hints may be lost). */
uint64_t dedup_index_bytes(const DedupIndex *index);
uint64_t dedup_index_growths(const DedupIndex *index);

#endif /* DEDUP_INDEX_H */
