/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restoring: the mirror image of the window.  Pages get their own memory
 * back with their contents, and the mappings of segments go away.
 *
 * Shared regions: the contents are written to the region's file and the file
 * is mapped there again.  Private regions: the contents are copied to fresh
 * anonymous memory, which is then moved over the place by mremap(), at one
 * stroke.  Both happen under the freeze, with the pins looked at inside it
 * and KSM kept out (ksm.c), so that neither a store nor a DMA write can fall
 * between the copy and the new mapping (I1, I5).
 *
 * A page that is dropped (zero) needs nothing: its own mapping is in place,
 * with a hole or fresh memory below it.
 * unmerge.c restores everything there is.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "freeze.h"
#include "internal.h"
#include "ksm.h"

/* How often to try to close a hole that the kernel left. */
#define HOLE_TRIES 100

/* The part of a restore window that is segment-mapped. */
typedef struct Span {
    DedupRegion *r;
    uint32_t first;
    uint32_t n;
    bool take[DEDUP_WINDOW_PAGES];   /* page is to be restored */
} Span;

static bool trim(Span *s)
{
    while (s->n && !dedup_entry_is_segment(dedup_entry_at(s->r, s->first))) {
        s->first++;
        s->n--;
    }
    while (s->n &&
           !dedup_entry_is_segment(dedup_entry_at(s->r, s->first + s->n - 1))) {
        s->n--;
    }
    return s->n > 0;
}

/*
 * May a device hold these pages to write to them?  Only where a pin counter
 * is raised, and only a copy: to write to a segment's page the kernel makes a
 * copy first, and in the freeze it makes none.  So a counter that nobody will
 * lower again keeps no page that was not copied.  (A device that reads may
 * hold the segment's page.  It goes on to see what was there, as if the guest
 * had stored to the page; who reads for long gets a copy to hold.)
 *
 * Calls the kernel, takes no lock and no memory (I11).
 */
static void find_held(const Span *s, bool *held)
{
    uint8_t flags[DEDUP_WINDOW_PAGES];
    bool any = false;

    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t entry = dedup_entry_at(s->r, s->first + i);

        held[i] = dedup_entry_is_segment(entry) &&
                  dedup_region_pinned(s->r, s->first + i);
        any |= held[i];
    }
    /* after the counters: a copy made for a pin is there by now, or waits */
    if (!any || !dedup_presence(s->r, s->first, s->n, flags)) {
        return;
    }
    for (uint32_t i = 0; i < s->n; i++) {
        held[i] &= (flags[i] & (DEDUP_PRESENT | DEDUP_SWAPPED)) &&
                   !DEDUP_MUTANT(RESTORE_HELD);
    }
}

/* Leave out what is held; returns how many pages are to be restored. */
static unsigned choose(Span *s)
{
    bool held[DEDUP_WINDOW_PAGES];
    unsigned taken = 0;

    find_held(s, held);
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t entry = dedup_entry_at(s->r, s->first + i);

        s->take[i] = dedup_entry_is_segment(entry) && !held[i];
        taken += s->take[i];
    }
    return taken;
}

/* The next run of pages to restore at or after *@i; false: no more. */
static bool next_run(const Span *s, uint32_t *i, uint32_t *n)
{
    while (*i < s->n && !s->take[*i]) {
        ++*i;
    }
    for (*n = 0; *i + *n < s->n && s->take[*i + *n]; ++*n) {
        ;
    }
    return *n > 0;
}

/* Before the freeze: what is to be copied, and no page of KSM's besides. */
static void take_from_ksm(const Span *s, bool whole)
{
    if (whole || DEDUP_MUTANT(RESTORE_KSM)) {
        dedup_ksm_take_range(s->r, s->first, s->n);
        return;
    }
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        dedup_ksm_take_range(s->r, s->first + i, n);
    }
}

static void enter_own(Span *s, uint32_t i, uint32_t n)
{
    for (uint32_t k = i; k < i + n; k++) {
        dedup_ledger_set(s->r, s->first + k, DEDUP_OWN);
    }
}

/* Write one run's contents to the file; on failure they leave it again. */
static bool write_back(DedupRegion *r, uint32_t page, uint32_t n,
                       const uint8_t *from)
{
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    off_t offset = dedup_region_file_offset(r, page);
    size_t done = 0;

    while (done < len) {
        ssize_t ret = DEDUP_FAIL(WRITE) ? 0 : pwrite(r->fd, from + done,
                                                     len - done,
                                                     offset + done);

        if (ret < 0 && errno == EINTR) {
            continue;
        }
        if (ret <= 0) {
            r->lacks |= DEDUP_LACK_FILE;
            dedup_punch_replaced(r, page, n);
            return false;
        }
        done += ret;
    }
    return true;
}

/*
 * Did the kernel unmap a place, and could not map there what was wanted?  That
 * takes a lack of its own memory at the worst moment.
 */
static bool has_hole(const DedupRegion *r, uint32_t page, uint32_t n)
{
    unsigned char vec[DEDUP_WINDOW_PAGES];

    return mincore(dedup_region_addr(r, page), (size_t)n << DEDUP_PAGE_SHIFT,
                   vec) < 0 && errno == ENOMEM;
}

/* What is in the file is mapped again; false: nothing has changed. */
static bool map_back(DedupRegion *r, uint32_t page, uint32_t n)
{
    bool ok = !DEDUP_FAIL(MAP_BACK) && dedup_region_map_own(r, page, n);

    for (unsigned try = 0; !ok && try < HOLE_TRIES && has_hole(r, page, n);
         try++) {
        ok = dedup_region_map_own(r, page, n);
    }
    r->lacks |= ok ? 0 : DEDUP_LACK_MAPS;
    return ok;
}

/* Nobody has stored to what was copied: KSM was kept out. */
static bool is_still_frozen(DedupRegion *r, uint32_t page, uint32_t n)
{
    bool ok = dedup_ksm_kept_out(r, page, n, NULL);

    r->lacks |= ok ? 0 : DEDUP_LACK_FREEZE;
    return ok;
}

/* Pages of memory that the region's file has, in all. */
static uint64_t file_pages(const DedupRegion *r)
{
    struct stat st;

    return fstat(r->fd, &st) == 0 ?
           (uint64_t)st.st_blocks * 512 >> DEDUP_PAGE_SHIFT : 0;
}

static void restore_shared(Span *s)
{
    DedupRegion *r = s->r;
    DedupEngine *e = r->engine;
    uint8_t *addr = dedup_region_addr(r, s->first);
    size_t len = (size_t)s->n << DEDUP_PAGE_SHIFT;
    uint64_t before = file_pages(r);
    uint64_t written = 0;

    take_from_ksm(s, false);
    if (!dedup_freeze_begin(&e->uffd, addr, len, false)) {
        r->lacks |= errno == ENOMEM ? DEDUP_LACK_MAPS : DEDUP_LACK_FREEZE;
        return;
    }
    choose(s);
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        uint32_t page = s->first + i;
        bool ok = write_back(r, page, n, dedup_region_addr(r, page));

        DEDUP_MUTANT_HOOK(COPIED);
        if (ok && (!is_still_frozen(r, page, n) || !map_back(r, page, n))) {
            /* where a hole stays, the file has the only copy */
            ok = has_hole(r, page, n);
            if (!ok) {
                dedup_punch_replaced(r, page, n);
            }
        }
        for (uint32_t k = i; k < i + n; k++) {
            s->take[k] = ok;
        }
    }
    dedup_freeze_end(&e->uffd, addr, len);
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        enter_own(s, i, n);
        written += n;
    }
    if (file_pages(r) > before + written) {
        dedup_punch_around(r, s->first, s->n);
    }
}

/* Fresh memory with the region's attributes. */
static uint8_t *staging_new(const DedupRegion *r, uint32_t page, size_t len)
{
    uint8_t *p = mmap(NULL, len, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS |
                      (r->flags & DEDUP_REGION_NORESERVE ? MAP_NORESERVE
                                                         : 0), -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    if (r->flags & DEDUP_REGION_DONTFORK) {
        madvise(p, len, MADV_DONTFORK);
    }
    if (r->flags & DEDUP_REGION_DONTDUMP) {
        madvise(p, len, MADV_DONTDUMP);
    }
    if (r->flags & DEDUP_REGION_HUGEPAGE) {
        bool nohuge = r->area[page / DEDUP_CHUNK_PAGES] & DEDUP_AREA_NOHUGE;

        madvise(p, len, nohuge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
    }
    return p;
}

/*
 * Moving memory costs a mapping for each piece.  In anonymous memory the own
 * pages between the pieces are moved along, so that a window ends as one
 * mapping.  Not where one of them is pinned, on swap, part of a huge page, or
 * shared by KSM: that would take memory which nobody has reserved.
 * Sets @move to the pages that have contents to copy.
 */
static bool choose_whole(Span *s, bool *move)
{
    uint8_t flags[DEDUP_WINDOW_PAGES];
    bool whole = s->r->memory == DEDUP_MEMORY_ANON &&
                 s->r->engine->zero_anon &&
                 dedup_presence(s->r, s->first, s->n, flags) &&
                 (DEDUP_MUTANT(RESTORE_KSM) ||
                  !dedup_ksm_shares_any(s->r, s->first, s->n, flags));

    for (uint32_t i = 0; i < s->n; i++) {
        bool own = !dedup_entry_is_segment(dedup_entry_at(s->r, s->first + i));

        move[i] = s->take[i];
        if (!whole) {
            continue;
        }
        if (!own) {
            whole = s->take[i];
            continue;
        }
        whole = !(flags[i] & (DEDUP_SWAPPED | DEDUP_HUGE)) &&
                !dedup_region_pinned(s->r, s->first + i);
        move[i] = flags[i] & DEDUP_PRESENT;
    }
    if (!whole) {
        memcpy(move, s->take, sizeof(s->take));
    }
    return whole;
}

/*
 * Unmap what was not moved away, and no more: another thread may have mapped
 * something in the place of what was.
 */
static void drop_staging(const Span *s, uint8_t *staging)
{
    for (uint32_t i = 0, j; i < s->n; i = j) {
        for (j = i + 1; j < s->n && s->take[j] == s->take[i]; j++) {
            ;
        }
        if (!s->take[i]) {
            munmap(staging + ((size_t)i << DEDUP_PAGE_SHIFT),
                   (size_t)(j - i) << DEDUP_PAGE_SHIFT);
        }
    }
}

/*
 * Move a run of the staging memory to its place, at one stroke.  False: it
 * is not there.  Where the kernel had unmapped the place already there is a
 * hole then, if trying again does not help: who touches it stops, which is
 * better than going on with other bytes.
 */
static bool move_run(DedupRegion *r, uint8_t *from, uint32_t page,
                     uint32_t n)
{
    uint8_t *to = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    unsigned try = 0;

    do {
        if (mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) !=
            MAP_FAILED) {
            return true;
        }
    } while (has_hole(r, page, n) && ++try < HOLE_TRIES);
    return false;
}

bool dedup_fill_hole(DedupRegion *r, uint32_t page, uint32_t n,
                     const uint8_t *content)
{
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    uint8_t *staging;

    if (!has_hole(r, page, n)) {
        return false;
    }
    if (r->memory == DEDUP_MEMORY_SHARED) {
        /*
         * Without @content it is what the file has there.  If the hole stays
         * after all, the file has the only copy: that makes the pages own.
         */
        return (!content || write_back(r, page, n, content)) &&
               (map_back(r, page, n) || has_hole(r, page, n));
    }
    /* one page more: or the kernel takes the hole itself for it, empty */
    staging = staging_new(r, page, len + DEDUP_PAGE_SIZE);
    if (!staging) {
        return false;
    }
    munmap(staging + len, DEDUP_PAGE_SIZE);
    for (uint32_t i = 0; content && i < n; i++) {
        dedup_page_copy(staging + ((size_t)i << DEDUP_PAGE_SHIFT),
                        content + ((size_t)i << DEDUP_PAGE_SHIFT));
    }
    if (!move_run(r, staging, page, n)) {
        munmap(staging, len);
        return false;
    }
    return true;
}

static void restore_private(Span *s)
{
    DedupRegion *r = s->r;
    DedupEngine *e = r->engine;
    uint8_t *addr = dedup_region_addr(r, s->first);
    size_t len = (size_t)s->n << DEDUP_PAGE_SHIFT;
    uint8_t *staging = staging_new(r, s->first, len);
    bool move[DEDUP_WINDOW_PAGES];
    bool whole;

    if (!staging) {
        r->lacks |= DEDUP_LACK_MAPS;
        return;
    }
    whole = choose_whole(s, move);
    take_from_ksm(s, whole);
    for (uint32_t i = 0; i < s->n; i++) {
        if (move[i]) {
            /* populate, so that the copy below need not */
            staging[(size_t)i << DEDUP_PAGE_SHIFT] = 0;
        }
    }
    /* "missing": an absent own page must not come to be while we look away */
    if (!dedup_freeze_begin(&e->uffd, addr, len,
                            r->memory == DEDUP_MEMORY_ANON)) {
        r->lacks |= errno == ENOMEM ? DEDUP_LACK_MAPS : DEDUP_LACK_FREEZE;
        munmap(staging, len);
        return;
    }
    choose(s);
    /* own pages that were not taken from KSM stay */
    if (choose_whole(s, move) && whole) {
        memset(s->take, true, s->n * sizeof(s->take[0]));
    }
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        size_t off = (size_t)i << DEDUP_PAGE_SHIFT;
        bool ok;

        for (uint32_t k = i; k < i + n; k++) {
            if (move[k]) {
                dedup_page_copy(staging + ((size_t)k << DEDUP_PAGE_SHIFT),
                                addr + ((size_t)k << DEDUP_PAGE_SHIFT));
            }
        }
        DEDUP_MUTANT_HOOK(COPIED);
        ok = is_still_frozen(r, s->first + i, n);
        if (ok) {
            ok = move_run(r, staging + off, s->first + i, n);
            r->lacks |= ok ? 0 : DEDUP_LACK_MAPS;
        }
        for (uint32_t k = i; k < i + n; k++) {
            s->take[k] = ok;
        }
    }
    dedup_freeze_end(&e->uffd, addr, len);
    drop_staging(s, staging);
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        enter_own(s, i, n);
    }
}

/*
 * No map left to move memory in: let the kernel copy the pages in place.  The
 * mappings of the segment stay, broken, and go when there is room.
 */
static void populate(Span *s)
{
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t page = s->first + i;
        uint32_t entry = dedup_entry_at(s->r, page);

        if (dedup_entry_is_segment(entry) && !(entry & DEDUP_BROKEN) &&
            madvise(dedup_region_addr(s->r, page), DEDUP_PAGE_SIZE,
                    MADV_POPULATE_WRITE) == 0) {
            dedup_ledger_set(s->r, page, entry | DEDUP_BROKEN);
        }
    }
}

unsigned dedup_restore_locked(DedupRegion *r, uint32_t first, unsigned n)
{
    DedupEngine *e = r->engine;
    Span s = { .r = r, .first = first, .n = n };
    unsigned left = 0;

    g_assert(n <= DEDUP_WINDOW_PAGES);
    if (r->dead) {
        return 0;
    }
    for (uint32_t i = first; i < first + n; i++) {
        if (dedup_entry_at(r, i) == DEDUP_ZERO) {
            dedup_ledger_absent(r, i);
        }
    }
    if (!trim(&s)) {
        return 0;
    }
    if (e->hard_blocked || e->uffd < 0) {
        r->lacks |= DEDUP_LACK_FREEZE;
    } else if (choose(&s)) {
        for (uint32_t i = 0; i < s.n; i++) {
            if (s.take[i]) {
                dedup_page_touch(dedup_region_addr(r, s.first + i));
            }
        }
        if (r->memory == DEDUP_MEMORY_SHARED) {
            restore_shared(&s);
        } else {
            restore_private(&s);
        }
    }
    for (uint32_t i = first; i < first + n; i++) {
        if (dedup_entry_is_segment(dedup_entry_at(r, i))) {
            left++;
            r->lacks |= dedup_region_pinned(r, i) ? DEDUP_LACK_UNPINNED : 0;
        }
    }
    if (left && r->memory != DEDUP_MEMORY_SHARED && !e->hard_blocked) {
        populate(&s);
    }
    return left;
}
