/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Doing what is to be done; see merge.h.
 */

#include <string.h>

#include "scan/ask.h"
#include "scan/merge.h"
#include "scan/publish.h"
#include "scan/todo.h"

/* What is claimed is waited for until so many passes have ended. */
#define PASSES_MOST 2

typedef enum Outcome {
    OUTCOME_DO,
    OUTCOME_KEEP,             /* it is not published yet */
    OUTCOME_DROP,
} Outcome;

/* Will what the hint says that somebody claimed be published? */
static bool is_coming(DedupScan *scan, const DedupHint *hint, uint64_t hash)
{
    return hint->where == dedup_group_self(scan->group) ?
           dedup_publish_has(scan, hash) :
           dedup_group_alive(scan->group, hint->where);
}

bool dedup_merge_is_right(DedupRegion *r, uint32_t page, const DedupHolding *h,
                         uint32_t index)
{
    return index < h->segment->npages &&
           (!dedup_memo_doubts(dedup_region_memo(r), page) ||
            dedup_space_equals(r, page,
                               dedup_segment_page(h->segment, index)));
}

/* With what shall the page be merged? */
static Outcome find(DedupScan *scan, DedupRegion *r, const DedupTask *task,
                    DedupAction *a)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(scan->index, task->hash, hits);
    bool coming = false;

    for (unsigned i = 0; i < n; i++) {
        bool stale;

        if (hits[i].kind == DEDUP_HINT_CLAIMED) {
            coming |= is_coming(scan, &hits[i], task->hash);
            continue;
        }
        if (hits[i].kind != DEDUP_HINT_PUBLISHED) {
            continue;
        }
        a->holding = dedup_ask_holding(scan, r, a->page, task->hash, &hits[i],
                                       &stale);
        a->index = hits[i].page;
        if (a->holding &&
            dedup_merge_is_right(r, a->page, a->holding, a->index)) {
            return OUTCOME_DO;
        }
    }
    return coming && (uint8_t)(scan->pass - task->pass) < PASSES_MOST ?
           OUTCOME_KEEP : OUTCOME_DROP;
}

static Outcome prepare(DedupScan *scan, DedupRegion *r, const DedupTask *task,
                       DedupAction *a)
{
    a->page = task->page - dedup_region_base(r);
    if (!task->zero) {
        return find(scan, r, task, a);
    }
    return dedup_space_zero_action(r, a->page, a, &scan->limits) ?
           OUTCOME_DO : OUTCOME_DROP;
}

/* A page that was merged counts neither as unshared nor as volatile. */
static void note_done(DedupScan *scan, DedupRegion *r, const DedupAction *a,
                      const DedupTask *task)
{
    DedupMemo *memo = dedup_region_memo(r);

    if (a->done) {
        scan->sums.found++;
        if (!task->told && task->pass == scan->pass) {
            dedup_memo_merged(memo, task->stable);
        }
    } else if (a->differs && a->holding) {
        dedup_memo_doubt(memo, a->page);
    }
}

/*
 * Tasks of one chunk, in order; returns how many of them are kept.  @stopped:
 * the scanner is asked for something.
 */
static unsigned run_chunk(DedupScan *scan, DedupRegion *r, DedupTask *tasks,
                          unsigned n, DedupTask *kept, bool *stopped)
{
    DedupAction *actions = scan->todo.actions;
    DedupTask done[DEDUP_CHUNK_PAGES]; /* @kept may be where they were */
    unsigned most = dedup_memo_may_merge(dedup_region_memo(r),
                                         (tasks[0].page -
                                          dedup_region_base(r)) /
                                         DEDUP_CHUNK_PAGES);
    /* if few are tried, others the next time: some may never be done */
    unsigned first = most < n ? scan->pass * most % (n - most + 1) : 0;
    unsigned nactions = 0, nkept = 0;
    uint32_t before = UINT32_MAX;

    for (unsigned i = first; i < n && nactions < most; i++) {
        DedupAction a = { 0 };

        if (tasks[i].page == before) {
            continue; /* found by us, and told by others */
        }
        before = tasks[i].page;
        switch (prepare(scan, r, &tasks[i], &a)) {
        case OUTCOME_DO:
            done[nactions] = tasks[i];
            actions[nactions++] = a;
            break;
        case OUTCOME_KEEP:
            kept[nkept++] = tasks[i];
            break;
        case OUTCOME_DROP:
            break;
        }
    }
    if (nactions) {
        dedup_space_windows(r, actions, nactions, &scan->limits);
        for (unsigned i = 0; i < nactions; i++) {
            if (actions[i].tried) {
                note_done(scan, r, &actions[i], &done[i]);
            } else {
                *stopped = true;
                kept[nkept++] = done[i];
            }
        }
    }
    return nkept;
}

/* The first of the tasks that is not in the chunk of the first one. */
static unsigned chunk_end(const DedupTask *tasks, unsigned n,
                          uint32_t base, uint32_t npages)
{
    uint32_t end = (tasks[0].page - base) / DEDUP_CHUNK_PAGES *
                   DEDUP_CHUNK_PAGES + DEDUP_CHUNK_PAGES;
    unsigned i = 1;

    while (i < n && tasks[i].page - base < MIN(end, npages)) {
        i++;
    }
    return i;
}

void dedup_scan_merge(DedupScan *scan)
{
    unsigned kept = 0, i = 0, n;
    DedupTask *tasks = dedup_todo_take(scan, &n);
    bool stopped = false;

    while (i < n && !stopped && dedup_scan_may_go_on(scan)) {
        unsigned end = i + 1;
        DedupRegion *r;
        uint32_t page;

        if (dedup_space_find(scan->space, tasks[i].page, &r, &page)) {
            end = i + chunk_end(tasks + i, n - i, dedup_region_base(r),
                                dedup_region_npages(r));
            /* what is kept never comes before what it is taken from */
            kept += run_chunk(scan, r, tasks + i, end - i, tasks + kept,
                              &stopped);
        }
        i = end;
    }
    memmove(tasks + kept, tasks + i, (n - i) * sizeof(tasks[0]));
    dedup_todo_keep(scan, kept + n - i);
}
