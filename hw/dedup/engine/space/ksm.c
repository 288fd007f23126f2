/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * KSM, the kernel's own page merging, beside ours.
 *
 * Where ksmd replaces a private page it installs a page table entry without
 * the write protection of a userfaultfd.  In the middle of a window that
 * lets a store pass to a page that is about to be replaced: it is lost.  So
 *
 * - memory is taken from KSM (MADV_UNMERGEABLE) before it is frozen.  When
 *   that returns, ksmd is at none of these pages: it looks at the flag of
 *   the mapping and merges under one taking of mmap_lock, whatever it
 *   remembers of the page from before.  Who made the mapping, and what was
 *   said about it, does not count: all memory of a process may be mergeable
 *   (PR_SET_MEMORY_MERGE), and somebody may say MADV_MERGEABLE at any time.
 * - within the freeze, when the pages were compared or copied, each must be
 *   protected still: somebody may have said it since.  A page that lost the
 *   protection never gets it back, so one that has it was not stored to.
 *
 * MADV_UNMERGEABLE breaks up what KSM has merged: each page gets memory of
 * its own at once.  So that KSM's savings are not lost before ours begin:
 *
 * - a whole chunk is taken only if KSM shares no page of it.  Then KSM does
 *   not look at it any more.
 * - else the pages are read where KSM has them, which costs nothing, and a
 *   window takes just those that it replaces, at most DEDUP_WINDOW_PAGES.
 *   What we find no use for stays with KSM, where it saves memory.
 * - the host must have the memory for that moment, or all is left to KSM; and
 *   for what windows took that came to nothing, as pages changed or were
 *   pinned: that is bounded until the room is looked at again.
 *
 * A page that KSM shares is owed to its guest as a merged one is (room.c).
 * The kernel's figure is too high until ksmd has come by and noticed what it
 * lost, as MADV_UNMERGEABLE leaves that to it: we publish later then.
 *
 * Runs under the remap lock, unless said otherwise.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host/clock.h"
#include "host/mutant.h"
#include "host/pagemap.h"
#include "host/sys.h"
#include "space/ksm.h"
#include "space/ledger.h"
#include "space/need.h"
#include "space/presence.h"

/*
 * How often to read ksm_stat: the kernel walks over all mappings for it, and
 * ksmd merges little in that time; and while ksmd rests, and has none of ours.
 */
#define STAT_NS (50 * INT64_C(1000000))
#define STAT_RESTS_NS (10 * INT64_C(1000000000))
/* Of the room, what windows that fail may take from KSM until the next look. */
#define FAILED_SHARE 8
#define FAILED_MOST (64ULL << 20)

void dedup_ksm_open(DedupSpace *space)
{
    /* Linux 6.1; without it each chunk is looked at */
    space->ksm.stat_fd = sys_open("/proc/self/ksm_stat", O_RDONLY | O_CLOEXEC);
    space->ksm.run_fd = sys_open("/sys/kernel/mm/ksm/run",
                                 O_RDONLY | O_CLOEXEC);
    space->ksm.may_take = UINT64_MAX; /* nobody has looked at the room yet */
}

void dedup_ksm_close(DedupSpace *space)
{
    if (space->ksm.stat_fd >= 0) {
        close(space->ksm.stat_fd);
    }
    if (space->ksm.run_fd >= 0) {
        close(space->ksm.run_fd);
    }
}

/* A figure of ksm_stat; 0 if it is not there. */
static uint64_t figure(const char *text, const char *name)
{
    const char *at = strstr(text, name);

    return at ? g_ascii_strtoull(at + strlen(name), NULL, 10) : 0;
}

/* Does ksmd look at pages?  If that cannot be read, yes. */
static bool ksmd_runs(const DedupKsm *k)
{
    char run = '1';

    return sys_pread(k->run_fd, &run, 1, 0) != 1 || run == '1';
}

static bool is_known(const DedupKsm *k, int64_t now)
{
    if (!k->known || now - k->read_ns >= STAT_RESTS_NS) {
        return false;
    }
    return now - k->read_ns < STAT_NS || (k->idle && !ksmd_runs(k));
}

static void read_stat(DedupSpace *space)
{
    int64_t now = dedup_now_ns();
    DedupKsm *k = &space->ksm;
    char text[512];
    ssize_t n;

    if (is_known(k, now)) {
        return;
    }
    k->read_ns = now;
    n = sys_pread(k->stat_fd, text, sizeof(text) - 1, 0);
    __atomic_store_n(&k->known, n > 0, __ATOMIC_RELAXED);
    if (n <= 0) {
        return;
    }
    text[n] = 0;
    __atomic_store_n(&k->zero, figure(text, "ksm_zero_pages "),
                     __ATOMIC_RELAXED);
    __atomic_store_n(&k->shared, figure(text, "ksm_merging_pages "),
                     __ATOMIC_RELAXED);
    k->idle = !k->shared && !k->zero && !figure(text, "ksm_rmap_items ");
}

/* Has KSM merged anything of this process?  If unknown, yes. */
static bool has_pages(const DedupSpace *space)
{
    return !space->ksm.known || space->ksm.shared || space->ksm.zero;
}

bool dedup_space_asks_room(DedupSpace *space)
{
    if (space->reads_only) {
        return false;
    }
    read_stat(space);
    space->ksm.may_take = UINT64_MAX;
    return has_pages(space);
}

void dedup_space_set_room(DedupSpace *space, uint64_t bytes)
{
    space->ksm.may_take = MIN(bytes / FAILED_SHARE, FAILED_MOST) >>
                          DEDUP_PAGE_SHIFT;
}

uint64_t dedup_space_ksm_bytes(DedupSpace *space)
{
    return __atomic_load_n(&space->ksm.shared, __ATOMIC_RELAXED) <<
           DEDUP_PAGE_SHIFT;
}

/* False: not all of it was taken. */
static bool take(DedupRegion *r, uint32_t page, uint32_t n)
{
    if (r->space->ksm.absent || DEDUP_MUTANT(KSM_LEFT)) {
        return true;
    }
    if (sys_madvise(dedup_region_addr(r, page), (size_t)n << DEDUP_PAGE_SHIFT,
                    MADV_UNMERGEABLE) == 0) {
        return true;
    }
    r->space->ksm.absent = errno == EINVAL; /* a kernel without KSM */
    return r->space->ksm.absent;
}

bool dedup_ksm_shares_any(DedupRegion *r, uint32_t first, uint32_t n,
                          const uint8_t *flags)
{
    DedupSpace *space = r->space;
    uint64_t entries[DEDUP_CHUNK_PAGES];
    bool zeroes = !__atomic_load_n(&space->ksm.known, __ATOMIC_RELAXED) ||
                  __atomic_load_n(&space->ksm.zero, __ATOMIC_RELAXED);
    uint8_t wanted = DEDUP_PRESENT | (zeroes ? DEDUP_ZERO_MAPPED : 0);
    off_t at = ((uintptr_t)dedup_region_addr(r, first) >> DEDUP_PAGE_SHIFT) *
               sizeof(entries[0]);

    g_assert(n <= DEDUP_CHUNK_PAGES);
    if (sys_pread(space->process.pagemap_fd, entries, n * sizeof(entries[0]),
                  at) != (ssize_t)(n * sizeof(entries[0]))) {
        return true;
    }
    for (uint32_t i = 0; i < n; i++) {
        if ((flags[i] & wanted) && (entries[i] & PM_PRESENT) &&
            !(entries[i] & (PM_FILE | PM_MMAP_EXCLUSIVE))) {
            return true;
        }
    }
    return false;
}

static bool chunk_shares_any(DedupRegion *r, uint32_t first, uint32_t n)
{
    uint8_t flags[DEDUP_CHUNK_PAGES];

    return !dedup_presence(r, first, n, flags) ||
           dedup_ksm_shares_any(r, first, n, flags);
}

void dedup_ksm_take_chunk(DedupRegion *r, uint32_t first)
{
    DedupSpace *space = r->space;
    uint32_t n = MIN(DEDUP_CHUNK_PAGES, r->npages - first);
    uint8_t *area = &r->area[first / DEDUP_CHUNK_PAGES];

    if ((*area & DEDUP_AREA_UNKSM) && (space->ksm.absent || space->ksm.idle)) {
        return;
    }
    /* it may have been made mergeable again */
    *area &= ~DEDUP_AREA_UNKSM;
    read_stat(space);
    if ((!has_pages(space) || !chunk_shares_any(r, first, n)) &&
        take(r, first, n)) {
        *area |= DEDUP_AREA_UNKSM;
    }
}

/* Pages of a file are not for KSM: of shared memory only copies are. */
static bool is_for_ksm(const DedupRegion *r, const DedupAction *a)
{
    return r->info.memory != DEDUP_MEMORY_SHARED ||
           dedup_entry_is_segment(dedup_entry_at(r, a->page));
}

static bool is_taken(const DedupRegion *r, const DedupAction *a)
{
    return r->area[a->page / DEDUP_CHUNK_PAGES] & DEDUP_AREA_UNKSM;
}

/* Each run of pages; a mapping will begin and end there anyway. */
static unsigned take_runs(DedupRegion *r, DedupAction **actions, unsigned n,
                          unsigned *limits)
{
    DedupKsm *k = &r->space->ksm;
    unsigned kept = 0;
    uint64_t news = 0;

    for (unsigned i = 0; i < n; i++) {
        news += !is_taken(r, actions[i]);
    }
    if (news > k->may_take) {
        *limits |= DEDUP_LIMIT_MEMORY;
        return 0;
    }
    k->may_take -= news;
    for (unsigned i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n &&
             actions[j]->page == actions[i]->page + (j - i); j++) {
            ;
        }
        if (take(r, actions[i]->page, j - i)) {
            memmove(&actions[kept], &actions[i], (j - i) *
                    sizeof(actions[0]));
            kept += j - i;
        } else {
            *limits |= errno == ENOMEM ? DEDUP_LIMIT_MEMORY : 0;
        }
    }
    return kept;
}

unsigned dedup_ksm_take_pages(DedupRegion *r, DedupAction **actions,
                              unsigned n, unsigned *limits)
{
    uint32_t first = actions[0]->page;
    bool taken = true, any = false;

    for (unsigned i = 0; i < n; i++) {
        taken &= is_taken(r, actions[i]);
        any |= is_for_ksm(r, actions[i]);
    }
    if (r->space->ksm.absent || !any) {
        return n;
    }
    if (!taken) {
        return take_runs(r, actions, n, limits);
    }
    /* most often there is nothing to do, and one call says so */
    return take(r, first, actions[n - 1]->page + 1 - first) ? n : 0;
}

void dedup_ksm_replaced(DedupRegion *r, const DedupAction *actions,
                        unsigned n)
{
    uint64_t *may_take = &r->space->ksm.may_take;

    for (unsigned i = 0; i < n; i++) {
        /* a zero page that a split dropped was never taken */
        *may_take += actions[i].done && !is_taken(r, &actions[i]) &&
                     *may_take < UINT64_MAX;
    }
}

void dedup_ksm_take_range(DedupRegion *r, uint32_t first, uint32_t n)
{
    take(r, first, n);
}

bool dedup_ksm_kept_out(DedupRegion *r, uint32_t first, uint32_t n,
                        const bool *which)
{
    DedupSpace *space = r->space;
    uint64_t entries[DEDUP_WINDOW_PAGES];
    off_t at = ((uintptr_t)dedup_region_addr(r, first) >> DEDUP_PAGE_SHIFT) *
               sizeof(entries[0]);
    bool kept_out = true;

    if (space->ksm.absent || DEDUP_MUTANT(KSM_LEFT) ||
        DEDUP_MUTANT(NO_FREEZE) ||
        dedup_freezer_keeps_ksm_out(&space->freezer)) {
        return true;
    }
    if (sys_pread(space->process.pagemap_fd, entries, n * sizeof(entries[0]),
                  at) != (ssize_t)(n * sizeof(entries[0]))) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        bool is_private = (entries[i] & (PM_PRESENT | PM_SWAPPED)) &&
                          !(entries[i] & PM_FILE);

        kept_out &= (which && !which[i]) || !is_private ||
                    (entries[i] & PM_UFFD_WP);
    }
    return kept_out;
}
