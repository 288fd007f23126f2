/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the index: what it holds, what it loses, what it costs, and what
 * it does when processes work on it at once, die in the middle, or fill it
 * with garbage.  What it takes memory for, and what makes room in it again:
 * test-dedup-index-room.c.
 */

#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "index-util.h"

static void test_empty(Fixture *f, gconstpointer data)
{
    DedupHint hits[DEDUP_INDEX_HITS];

    dedup_index_prefetch(f->index, hash_of(1));
    g_assert_cmpuint(dedup_index_lookup(f->index, hash_of(1), hits), ==, 0);
    g_assert_cmpuint(dedup_index_bytes(f->index), ==, 0);
    g_assert_cmpuint(dedup_index_growths(f->index), ==, 0);
    /* A lookup in an empty index takes no memory; the header is one page. */
    g_assert_cmpuint(file_bytes(f), <=, HEADER_SIZE);
}

static void test_replace_remove(Fixture *f, gconstpointer data)
{
    const uint64_t hash = hash_of(7);
    DedupHint c = candidate(255, (1u << DEDUP_MEMBER_PAGE_BITS) - 1);
    DedupHint p = published((1u << DEDUP_GID_BITS) - 1,
                            (1u << DEDUP_GID_PAGE_BITS) - 1);
    DedupHint found, hits[DEDUP_INDEX_HITS];

    g_assert_true(dedup_index_insert(f->index, hash, &c));
    /* Inserting it again does not take another entry. */
    g_assert_true(dedup_index_insert(f->index, hash, &c));
    g_assert_cmpuint(dedup_index_lookup(f->index, hash, hits), ==, 1);
    g_assert_true(find(f->index, hash, &c, &found));
    g_assert_cmpuint(dedup_index_lookup(f->index, hash_of(8), hits), ==, 0);

    g_assert_true(dedup_index_replace(f->index, hash, &found, &p));
    g_assert_false(find(f->index, hash, &c, NULL));
    g_assert_false(dedup_index_replace(f->index, hash, &found, &p));
    g_assert_false(dedup_index_remove(f->index, hash, &found));
    g_assert_true(find(f->index, hash, &p, &found));
    g_assert_true(dedup_index_remove(f->index, hash, &found));
    g_assert_cmpuint(dedup_index_lookup(f->index, hash, hits), ==, 0);
}

/* Published hints come first, and no more than DEDUP_INDEX_HITS come. */
static void test_order(Fixture *f, gconstpointer data)
{
    const uint64_t hash = hash_of(3);
    DedupHint hits[DEDUP_INDEX_HITS], hint;

    for (unsigned i = 0; i < 6; i++) {
        hint = candidate(i, i);
        g_assert_true(dedup_index_insert(f->index, hash, &hint));
    }
    hint = published(77, 5);
    g_assert_true(dedup_index_insert(f->index, hash, &hint));
    g_assert_cmpuint(dedup_index_lookup(f->index, hash, hits), ==,
                     DEDUP_INDEX_HITS);
    g_assert_true(same(&hits[0], &hint));
    for (unsigned i = 1; i < DEDUP_INDEX_HITS; i++) {
        g_assert_cmpint(hits[i].kind, ==, DEDUP_HINT_CANDIDATE);
    }
}

/*
 * One hash for all (C21): 16 entries have room.  Candidates give way, to
 * published hints too; a published one never does.
 */
static void test_full_lines(Fixture *f, gconstpointer data)
{
    const uint64_t hash = hash_of(11);
    DedupHint hint, hits[DEDUP_INDEX_HITS];
    unsigned kept = 0;

    for (unsigned i = 0; i < 1000; i++) {
        hint = candidate(1, i);
        g_assert_true(dedup_index_insert(f->index, hash, &hint));
        /* The newest is there, though others may be beyond the 4 hits. */
    }
    /* Forced collisions are no reason to grow. */
    g_assert_cmpuint(dedup_index_bytes(f->index), <=, 2 * DEDUP_PAGE_SIZE);
    for (unsigned i = 0; i < 16; i++) {
        hint = published(100 + i, i);
        g_assert_true(dedup_index_insert(f->index, hash, &hint));
    }
    g_assert_cmpuint(dedup_index_lookup(f->index, hash, hits), ==, 4);
    for (unsigned i = 0; i < 4; i++) {
        g_assert_cmpint(hits[i].kind, ==, DEDUP_HINT_PUBLISHED);
    }
    /* Full of published ones: a candidate replaces none. */
    dedup_index_set_limit(f->index, 0);
    for (unsigned i = 0; i < 100; i++) {
        hint = candidate(1, i);
        dedup_index_insert(f->index, hash, &hint);
    }
    for (unsigned i = 0; i < 16; i++) {
        DedupHint found;

        hint = published(100 + i, i);
        /* Take out what is seen first, so that the rest comes to light. */
        if (find(f->index, hash, &hint, &found)) {
            g_assert_true(dedup_index_remove(f->index, hash, &found));
            kept++;
            i = -1;
        }
    }
    g_assert_cmpuint(kept, ==, 16);
}

/*
 * Fill and grow: at most 0.5 % of the hints are lost, at most 10.7 bytes are
 * taken per entry, on average over the sizes from 64K entries on.
 */
static void test_fill(Fixture *f, gconstpointer data)
{
    const uint64_t last = (1 << 20) / SCALE;
    uint64_t next = 65536, lost = 0, at = 0;
    double bytes = 0, worst = 0, worst_loss = 0;
    unsigned samples = 0;

    for (uint64_t i = 0; i < last; i++) {
        DedupHint hint = candidate(i % 256, i);

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
        if (i + 1 >= 65536 && (i + 1) % 4096 == 0) {
            double per_entry = dedup_index_bytes(f->index) / (double)(i + 1);

            bytes += per_entry;
            worst = MAX(worst, per_entry);
            samples++;
        }
        if (i + 1 == next) {
            lost = 0;
            for (uint64_t j = 0; j <= i; j++) {
                hint = candidate(j % 256, j);
                lost += !find(f->index, hash_of(j), &hint, NULL);
            }
            worst_loss = MAX(worst_loss, 100.0 * lost / (i + 1));
            next = next * 9 / 8;
            at = i + 1;
        }
    }
    g_test_message("%.2f bytes per entry on average, %.2f at most; "
                   "%.3f %% lost at most, %.3f %% at %" PRIu64 " entries; "
                   "%" PRIu64 " growths", bytes / samples, worst, worst_loss,
                   100.0 * lost / at, at, dedup_index_growths(f->index));
    g_assert_cmpfloat(bytes / samples, <=, 10.7);
    g_assert_cmpfloat(worst, <=, 11);
    g_assert_cmpfloat(worst_loss, <, 0.5);
    /* What it says it takes is what it takes. */
    g_assert_cmpuint(file_bytes(f), ==,
                     dedup_index_bytes(f->index) + HEADER_SIZE);
}

/* A limit stops the growth; the newest hints stay findable. */
static void test_limit(Fixture *f, gconstpointer data)
{
    const unsigned n = 400000 / SCALE;
    unsigned found = 0;

    dedup_index_set_limit(f->index, 65536 / SCALE);
    for (unsigned i = 0; i < n; i++) {
        DedupHint hint = candidate(0, i);

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    g_assert_cmpuint(dedup_index_bytes(f->index), <=, 65536 / SCALE * 16);
    for (unsigned i = n - 10000 / SCALE; i < n; i++) {
        DedupHint hint = candidate(0, i);

        found += find(f->index, hash_of(i), &hint, NULL);
    }
    g_assert_cmpuint(found, >, 8000 / SCALE);
}

/* Removing brings the count down: the table does not grow without need. */
static void test_churn(Fixture *f, gconstpointer data)
{
    const unsigned live = 20000;

    for (unsigned i = 0; i < live + 400000 / SCALE; i++) {
        DedupHint hint = candidate(3, i), found;

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
        if (i >= live) {
            hint.page = i - live;
            if (find(f->index, hash_of(i - live), &hint, &found)) {
                g_assert_true(dedup_index_remove(f->index,
                                                 hash_of(i - live), &found));
            }
        }
    }
    g_assert_cmpuint(dedup_index_bytes(f->index), <=, live * 14);
}

static pid_t child(Fixture *f, void (*fn)(DedupIndex *, unsigned), unsigned k)
{
    pid_t pid = fork();

    g_assert_cmpint(pid, >=, 0);
    if (pid == 0) {
        /* A view of its own, as another process has. */
        DedupIndex *index = dedup_index_new(f->header, f->table, f->fd,
                                            HEADER_SIZE);

        fn(index, k);
        dedup_index_free(index);
        _exit(0);
    }
    return pid;
}

#define PER_CHILD (40000u / SCALE)

static void insert(DedupIndex *index, unsigned k, bool check)
{
    for (unsigned i = 0; i < PER_CHILD; i++) {
        DedupHint hint = candidate(k, i);
        DedupHint hits[DEDUP_INDEX_HITS];
        uint64_t hash = hash_of(k * PER_CHILD + i);
        unsigned n;

        if (!dedup_index_insert(index, hash, &hint)) {
            _exit(1);
        }
        if (!check) {
            continue;
        }
        /* Whatever comes back is in bounds and was put in by somebody. */
        n = dedup_index_lookup(index, hash_of(i * 7919 % (8 * PER_CHILD)),
                               hits);
        for (unsigned j = 0; j < n; j++) {
            if (hits[j].kind != DEDUP_HINT_CANDIDATE ||
                hits[j].where >= 8 || hits[j].page >= PER_CHILD) {
                _exit(2);
            }
        }
    }
}

static void insert_and_check(DedupIndex *index, unsigned k)
{
    insert(index, k, true);
}

static void reap(pid_t pid)
{
    int status;

    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 0);
}

static unsigned count_found(Fixture *f, unsigned children)
{
    unsigned found = 0;

    for (unsigned k = 0; k < children; k++) {
        for (unsigned i = 0; i < PER_CHILD; i++) {
            DedupHint hint = candidate(k, i);

            found += find(f->index, hash_of(k * PER_CHILD + i), &hint, NULL);
        }
    }
    return found;
}

/* Four processes fill it at once, while it grows from nothing. */
static void test_processes(Fixture *f, gconstpointer data)
{
    pid_t pid[4];
    unsigned found;

    for (unsigned k = 0; k < G_N_ELEMENTS(pid); k++) {
        pid[k] = child(f, insert_and_check, k);
    }
    for (unsigned k = 0; k < G_N_ELEMENTS(pid); k++) {
        reap(pid[k]);
    }
    found = count_found(f, G_N_ELEMENTS(pid));
    g_test_message("%u of %u hints found", found,
                   (unsigned)G_N_ELEMENTS(pid) * PER_CHILD);
    g_assert_cmpuint(found, >, G_N_ELEMENTS(pid) * PER_CHILD / 100 * 98);
}

static void insert_forever(DedupIndex *index, unsigned k)
{
    for (unsigned i = 0;; i++) {
        DedupHint hint = candidate(k, i % (1u << DEDUP_MEMBER_PAGE_BITS));

        dedup_index_insert(index, hash_of((uint64_t)k << 32 | i), &hint);
    }
}

/*
 * Processes are killed while the table grows: only hints are lost, and those
 * that survive are found, and the table goes on working.
 */
static void test_kill(Fixture *f, gconstpointer data)
{
    unsigned found, rounds = 0;

    dedup_index_set_limit(f->index, 1 << 20);
    for (unsigned k = 0; k < 20; k++) {
        uint64_t growths = dedup_index_growths(f->index);
        pid_t pid = child(f, insert_forever, k);
        int status;

        /* Its next growth is the event; it is killed in it or soon after. */
        while (dedup_index_growths(f->index) < growths + 5 + k) {
            g_usleep(10);
        }
        kill(pid, SIGKILL);
        g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
        g_assert_true(WIFSIGNALED(status));
        rounds++;
    }
    g_assert_cmpuint(rounds, ==, 20);
    insert(f->index, 0, false);
    found = count_found(f, 1);
    g_assert_cmpuint(found, >, PER_CHILD / 100 * 98);
}

static void check_hits(Fixture *f, uint64_t hash)
{
    DedupHint hits[DEDUP_INDEX_HITS], hint = candidate(9, 9);
    unsigned n = dedup_index_lookup(f->index, hash, hits);

    g_assert_cmpuint(n, <=, DEDUP_INDEX_HITS);
    for (unsigned i = 0; i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED) {
            g_assert_cmpuint(hits[i].where, <, 1u << DEDUP_GID_BITS);
            g_assert_cmpuint(hits[i].page, <, 1u << DEDUP_GID_PAGE_BITS);
        } else {
            g_assert_cmpint(hits[i].kind, !=, DEDUP_HINT_NONE);
            g_assert_cmpuint(hits[i].where, <, 1u << DEDUP_MEMBER_BITS);
            g_assert_cmpuint(hits[i].page, <, 1u << DEDUP_MEMBER_PAGE_BITS);
        }
        if (hash & 1) {
            dedup_index_remove(f->index, hash, &hits[i]);
        } else {
            dedup_index_replace(f->index, hash, &hits[i], &hint);
        }
    }
    dedup_index_insert(f->index, hash, &hint);
}

/* An enemy fills the table with garbage: no number is out of bounds. */
static void test_garbage_table(Fixture *f, gconstpointer data)
{
    uint64_t garbage[512];

    for (unsigned i = 0; i < 65536 / SCALE; i++) {
        DedupHint hint = candidate(1, i);

        dedup_index_insert(f->index, hash_of(i), &hint);
    }
    for (unsigned round = 0; round < 4; round++) {
        for (uint64_t page = 0; page < 16 * 65536; page += 65536) {
            for (unsigned j = 0; j < 12; j++) {
                for (unsigned i = 0; i < G_N_ELEMENTS(garbage); i++) {
                    garbage[i] = hash_of(round * 131 + page * 512 + j * 7919 +
                                         i);
                }
                g_assert_cmpint(pwrite(f->fd, garbage, sizeof(garbage),
                                       HEADER_SIZE +
                                       (page + j) * DEDUP_PAGE_SIZE), ==,
                                sizeof(garbage));
            }
        }
        for (unsigned i = 0; i < 50000 / SCALE; i++) {
            check_hits(f, hash_of(round * 1000000 + i));
        }
    }
}

/* An enemy writes to the header: any number of pages, any count. */
static void test_garbage_header(Fixture *f, gconstpointer data)
{
    uint64_t *header = f->header;
    size_t words = dedup_index_header_size() / sizeof(uint64_t);

    for (unsigned round = 0; round < 40; round++) {
        for (size_t i = 0; i < words; i++) {
            uint64_t garbage = hash_of(round * 1000 + i);

            /* Some plausible, some huge, some zero. */
            header[i] = garbage >> (garbage % 65 == 64 ? 0 : garbage % 64);
        }
        for (unsigned i = 0; i < 100; i++) {
            check_hits(f, hash_of(round * 100 + i));
        }
        g_assert_cmpuint(dedup_index_bytes(f->index), <=,
                         dedup_index_table_size());
    }
    /* It works again when it is left alone. */
    memset(f->header, 0, dedup_index_header_size());
    insert(f->index, 0, false);
    g_assert_cmpuint(count_found(f, 1), >, PER_CHILD / 100 * 95);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    index_add("/index/empty", test_empty);
    index_add("/index/replace-remove", test_replace_remove);
    index_add("/index/order", test_order);
    index_add("/index/full-lines", test_full_lines);
    index_add("/index/fill", test_fill);
    index_add("/index/limit", test_limit);
    index_add("/index/churn", test_churn);
    index_add("/index/processes", test_processes);
    index_add("/index/kill", test_kill);
    index_add("/index/garbage-table", test_garbage_table);
    index_add("/index/garbage-header", test_garbage_header);
    return g_test_run();
}
