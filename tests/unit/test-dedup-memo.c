/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is remembered of pages, and for how long those are left alone that are
 * written again and again.  Time is what the test says.
 */

#include <glib.h>

#include "host/mutant.h"
#include "scan/memo.h"

#define PAGES (3 * DEDUP_CHUNK_PAGES)

static DedupMemo *memo_new(void)
{
    DedupMemo *m = dedup_memo_new(PAGES);

    g_assert_nonnull(m);
    dedup_never_rests = false;
    return m;
}

/* In the first pass all has rested; then it takes two looks. */
static void test_stable(void)
{
    DedupMemo *m = memo_new();
    DedupCounts sum = { 0 };

    m->begun = 1;
    g_assert_true(dedup_memo_see(m, 5, 1ULL << 60));
    g_assert_true(dedup_memo_see(m, 6, 0));
    g_assert_false(dedup_memo_see(m, 5, 2ULL << 60));
    m->begun = 2;
    g_assert_true(dedup_memo_see(m, 5, 2ULL << 60));
    g_assert_true(dedup_memo_see(m, 6, 0));
    g_assert_false(dedup_memo_see(m, 6, 3ULL << 60));
    g_assert_false(dedup_memo_see(m, 7, 4ULL << 60));
    g_assert_true(dedup_memo_see(m, 7, 4ULL << 60));
    dedup_memo_merged(m, true);
    dedup_memo_take_counts(m, &sum);
    g_assert_cmpuint(sum.unshared, ==, 4);
    g_assert_cmpuint(sum.volatiles, ==, 3);
    dedup_memo_free(m);
}

/* A doubt stays as long as the page does. */
static void test_doubt(void)
{
    DedupMemo *m = memo_new();

    dedup_memo_see(m, 9, 1ULL << 60);
    g_assert_false(dedup_memo_doubts(m, 9));
    dedup_memo_doubt(m, 9);
    g_assert_true(dedup_memo_see(m, 9, 1ULL << 60));
    g_assert_true(dedup_memo_doubts(m, 9));
    g_assert_false(dedup_memo_see(m, 9, 2ULL << 60));
    g_assert_false(dedup_memo_doubts(m, 9));
    dedup_memo_free(m);
}

/* How often a page is due in @seconds, with a pass in each. */
static unsigned count_due(DedupMemo *m, uint32_t page, unsigned seconds)
{
    unsigned n = 0;

    for (unsigned s = 0; s < seconds; s++) {
        DedupMemoClock clock = { .before = 5000 + s, .now = 5001 + s };

        n += dedup_memo_is_due(m, page, &clock);
    }
    return n;
}

/* Each time that it is written after a merge it is looked at half as often. */
static void test_patience(void)
{
    DedupMemo *m = memo_new();
    DedupMemoClock long_pass = { .before = 1000, .now = 1000 + (1 << 12) };

    m->begun = 2;
    dedup_memo_see(m, 7, 1ULL << 60);
    g_assert_cmpuint(count_due(m, 7, 64), ==, 64);
    for (unsigned p = 1; p < 14; p++) {
        dedup_memo_broke(m, 7);
        g_assert_cmpuint(count_due(m, 7, 4096), ==, 4096 >> MIN(p, 10));
        /* a pass that takes longer than that sees it in any case */
        g_assert_true(dedup_memo_is_due(m, 7, &long_pass));
    }
    /* it begins anew: not what it was before it was merged */
    g_assert_false(dedup_memo_see(m, 7, 1ULL << 60));
    g_assert_true(dedup_memo_see(m, 7, 1ULL << 60));
    g_assert_cmpuint(count_due(m, 7, 4096), ==, 4);
    g_assert_cmpuint(count_due(m, 8, 4096), ==, 4096);
    dedup_memo_free(m);
}

/* A good part of a chunk was written: it rests, longer and longer. */
static void test_rest(void)
{
    DedupMemo *m = memo_new();
    uint32_t now = 100;

    /* a few pages, or a small part, are none of a chunk's business */
    dedup_memo_judge(m, 1, now, 33, 7);
    now += 100;
    dedup_memo_judge(m, 1, now, 480, 32);
    dedup_memo_judge(m, 1, now + 4, 449, 31);
    g_assert_false(dedup_memo_rests(m, 1, now + 4));
    g_assert_cmpuint(dedup_memo_may_merge(m, 1), ==, DEDUP_CHUNK_PAGES);
    now += 100;
    dedup_memo_judge(m, 1, now, 449, 63);
    g_assert_false(dedup_memo_rests(m, 1, now));

    /* in one look, or in several */
    now += 100;
    dedup_memo_judge(m, 1, now, 480, 32);
    dedup_memo_judge(m, 1, now, 448, 32);
    for (unsigned level = 0; level < 8; level++) {
        uint32_t rest = 8u << level;

        g_assert_true(dedup_memo_rests(m, 1, now + rest - 1));
        /* the rest of what was merged breaks */
        dedup_memo_judge(m, 1, now + rest - 1, 0, 100);
        g_assert_false(dedup_memo_rests(m, 1, now + rest));
        g_assert_false(dedup_memo_rests(m, 0, now));
        now += rest;
        /* one of the few that are tried is enough */
        g_assert_cmpuint(dedup_memo_may_merge(m, 1), ==, 4);
        dedup_memo_judge(m, 1, now, 3, 1);
    }
    dedup_memo_free(m);
}

/* What is tried and not written is trusted again, step by step. */
static void test_trust(void)
{
    DedupMemo *m = memo_new();
    uint32_t now = 100;

    dedup_memo_judge(m, 2, now, 212, 300);
    now += 8;
    for (unsigned tries = 4; tries < DEDUP_CHUNK_PAGES; tries *= 4) {
        g_assert_false(dedup_memo_rests(m, 2, now));
        g_assert_cmpuint(dedup_memo_may_merge(m, 2), ==, tries);
        dedup_memo_judge(m, 2, now + 1, tries, 0); /* too soon to tell */
        g_assert_cmpuint(dedup_memo_may_merge(m, 2), ==, tries);
        now += 2;
        dedup_memo_judge(m, 2, now, 0, 0); /* nothing was tried */
        g_assert_cmpuint(dedup_memo_may_merge(m, 2), ==, tries);
        dedup_memo_judge(m, 2, now, tries, 0);
    }
    g_assert_cmpuint(dedup_memo_may_merge(m, 2), >=, DEDUP_CHUNK_PAGES);
    /* it is not forgotten so soon: one page is enough still */
    g_assert_cmpuint(m->nrests, ==, 1);
    dedup_memo_judge(m, 2, now + 200, 512, 0);
    g_assert_cmpuint(m->nrests, ==, 0);
    dedup_memo_judge(m, 2, now + 201, 33, 7);
    g_assert_false(dedup_memo_rests(m, 2, now + 202));
    dedup_memo_free(m);
}

/* All of the chunk is merged, and its pages forgotten: its rest is not. */
static void test_forget(void)
{
    DedupMemo *m = memo_new();

    dedup_memo_see(m, 0, 1ULL << 60);
    dedup_memo_judge(m, 0, 50, 0, 512);
    dedup_memo_forget(m, 0, 3);
    g_assert_cmpuint(m->ntaken, ==, 0);
    g_assert_true(dedup_memo_rests(m, 0, 51));
    dedup_memo_free(m);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/memo/stable", test_stable);
    g_test_add_func("/memo/doubt", test_doubt);
    g_test_add_func("/memo/patience", test_patience);
    g_test_add_func("/memo/rest", test_rest);
    g_test_add_func("/memo/trust", test_trust);
    g_test_add_func("/memo/forget", test_forget);
    return g_test_run();
}
