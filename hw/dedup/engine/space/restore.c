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
 * Who restores what: walk.c.
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "host/mutant.h"
#include "host/reader.h"
#include "host/sys.h"
#include "space/ksm.h"
#include "space/ledger.h"
#include "space/own.h"
#include "space/presence.h"
#include "space/punch.h"
#include "space/restore.h"

/* The part of a restore window that is segment-mapped. */
typedef struct Span {
    DedupRegion *r;
    uint32_t first;
    uint32_t n;
    bool take[DEDUP_RESTORE_PAGES];   /* page is to be restored */
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
    uint8_t flags[DEDUP_RESTORE_PAGES];
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
    bool held[DEDUP_RESTORE_PAGES];
    unsigned taken = 0;

    find_held(s, held);
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t entry = dedup_entry_at(s->r, s->first + i);

        s->take[i] = dedup_entry_is_segment(entry) && !held[i];
        s->r->lacks |= held[i] ? DEDUP_LACK_UNPINNED : 0;
        taken += s->take[i];
    }
    return taken;
}

/*
 * Once more in the freeze: leave out what is held by now.  What was held before
 * was not taken from KSM, and stays out.
 */
static void choose_again(Span *s)
{
    bool held[DEDUP_RESTORE_PAGES];

    find_held(s, held);
    for (uint32_t i = 0; i < s->n; i++) {
        s->take[i] &= !held[i];
    }
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

    return sys_fstat(r->info.fd, &st) == 0 ?
           (uint64_t)st.st_blocks * 512 >> DEDUP_PAGE_SHIFT : 0;
}

/* It could not be frozen: errno says why. */
static void note_unfrozen(DedupRegion *r)
{
    bool pinned = errno == EBUSY &&
                  dedup_freezer_fails_in_kernel(&r->space->freezer);

    r->lacks |= errno == ENOMEM ? DEDUP_LACK_MAPS :
                pinned ? DEDUP_LACK_UNPINNED : DEDUP_LACK_FREEZE;
}

static void restore_shared(Span *s)
{
    DedupRegion *r = s->r;
    uint64_t before = file_pages(r);
    uint64_t written = 0;
    DedupFrozen frozen;

    take_from_ksm(s, false);
    DEDUP_MUTANT_HOOK(CHOSEN);
    if (!dedup_region_freeze(r, s->first, s->n, false, &frozen)) {
        note_unfrozen(r);
        return;
    }
    choose_again(s);
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        uint32_t page = s->first + i;
        bool ok = dedup_own_write(r, page, n, dedup_region_addr(r, page));

        DEDUP_MUTANT_HOOK(COPIED);
        if (ok && (!is_still_frozen(r, page, n) ||
                   !dedup_own_map_back(r, page, n))) {
            /* where a hole stays, the file has the only copy */
            ok = dedup_own_has_hole(r, page, n);
            if (!ok) {
                dedup_punch_replaced(r, page, n);
            }
        }
        for (uint32_t k = i; k < i + n; k++) {
            s->take[k] = ok;
        }
    }
    dedup_freeze_end(&frozen);
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        enter_own(s, i, n);
        written += n;
    }
    if (file_pages(r) > before + written) {
        dedup_punch_around(r, s->first, s->n);
    }
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
    uint8_t flags[DEDUP_RESTORE_PAGES];
    bool whole = s->r->info.memory == DEDUP_MEMORY_ANON &&
                 s->r->space->freezer.zero_anon &&
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
            sys_munmap(staging + ((size_t)i << DEDUP_PAGE_SHIFT),
                       (size_t)(j - i) << DEDUP_PAGE_SHIFT);
        }
    }
}

static void restore_private(Span *s)
{
    DedupRegion *r = s->r;
    uint8_t *addr = dedup_region_addr(r, s->first);
    size_t len = (size_t)s->n << DEDUP_PAGE_SHIFT;
    uint8_t *staging = dedup_own_staging(r, s->first, len);
    bool move[DEDUP_RESTORE_PAGES];
    DedupFrozen frozen;
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
    DEDUP_MUTANT_HOOK(CHOSEN);
    /* "missing": an absent own page must not come to be while we look away */
    if (!dedup_region_freeze(r, s->first, s->n,
                             r->info.memory == DEDUP_MEMORY_ANON, &frozen)) {
        note_unfrozen(r);
        sys_munmap(staging, len);
        return;
    }
    choose_again(s);
    /* own pages that were not taken from KSM stay */
    if (choose_whole(s, move) && whole) {
        memset(s->take, true, s->n * sizeof(s->take[0]));
    }
    for (uint32_t i = 0, n; next_run(s, &i, &n); i += n) {
        size_t off = (size_t)i << DEDUP_PAGE_SHIFT;
        bool ok = true;

        for (uint32_t k = i; ok && k < i + n; k++) {
            ok = !move[k] ||
                 dedup_page_copy(staging + ((size_t)k << DEDUP_PAGE_SHIFT),
                                 addr + ((size_t)k << DEDUP_PAGE_SHIFT));
        }
        r->lacks |= ok ? 0 : DEDUP_LACK_POISON;
        DEDUP_MUTANT_HOOK(COPIED);
        ok = ok && is_still_frozen(r, s->first + i, n);
        if (ok) {
            ok = dedup_own_move(r, staging + off, s->first + i, n);
            r->lacks |= ok ? 0 : DEDUP_LACK_MAPS;
        }
        for (uint32_t k = i; k < i + n; k++) {
            s->take[k] = ok;
        }
    }
    dedup_freeze_end(&frozen);
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
            sys_madvise(dedup_region_addr(s->r, page), DEDUP_PAGE_SIZE,
                        MADV_POPULATE_WRITE) == 0) {
            dedup_ledger_set(s->r, page, entry | DEDUP_BROKEN);
        }
    }
}

/*
 * Map a page that is to be read in the freeze.  If what it is merged to is
 * broken it stays so: its contents are nowhere.  A guest that touches it is
 * told, as of a broken page of its own.
 */
static void touch(Span *s, uint32_t i)
{
    s->take[i] = dedup_page_touch(dedup_region_addr(s->r, s->first + i));
    s->r->lacks |= s->take[i] ? 0 : DEDUP_LACK_POISON;
}

/* A part of a restore's range; returns how many pages of it are left. */
static unsigned restore_part(DedupRegion *r, uint32_t first, unsigned n)
{
    DedupSpace *space = r->space;
    Span s = { .r = r, .first = first, .n = n };
    unsigned left = 0;

    for (uint32_t i = first; i < first + n; i++) {
        if (dedup_entry_at(r, i) == DEDUP_ZERO) {
            dedup_ledger_absent(r, i);
        }
    }
    if (!trim(&s)) {
        return 0;
    }
    if (space->sealed || dedup_freezer_is_lost(&space->freezer)) {
        r->lacks |= DEDUP_LACK_FREEZE;
    } else if (choose(&s)) {
        for (uint32_t i = 0; i < s.n; i++) {
            if (s.take[i]) {
                touch(&s, i);
            }
        }
        if (r->info.memory == DEDUP_MEMORY_SHARED) {
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
    if (left && r->info.memory != DEDUP_MEMORY_SHARED && !space->sealed) {
        populate(&s);
    }
    return left;
}

unsigned dedup_restore_locked(DedupRegion *r, uint32_t first, unsigned n)
{
    unsigned left = 0;

    g_assert(n <= DEDUP_RESTORE_PAGES);
    dedup_space_assert_locked(r->space);
    dedup_reader_enter();
    /* what cannot be frozen is left, page by page: a part of its own */
    for (uint32_t i = 0, part; !r->dead && i < n; i += part) {
        part = MAX(dedup_region_freezable(r, first + i, n - i), 1);
        left += restore_part(r, first + i, part);
    }
    dedup_reader_leave();
    return left;
}
