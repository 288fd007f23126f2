/*
 * Guest agent: memory regions with known contents
 *
 * A region is anonymous memory of whole pages.  What a page holds follows
 * from its pattern, its index and its generation, so that every byte can be
 * checked at any time; "region_rewrite" and the loop raise generations.
 * Patterns:
 *
 *   signed    no page equals any other page of any guest
 *   same S    page i equals page i of every region "same S" of any guest
 *   dup K     each content K times in this region
 *   zero      zero in even generations, signed in odd ones
 *   mixed     runs of 16 pages: signed, same 7, dup 4, zero in turn
 *
 * In "same" and "dup" eight generations repeat, so that pages which were
 * written become equal again.  The generations are kept beside the region:
 * a page that silently goes back to an older content is an error.
 *
 * Threads: commands run on the main thread.  A loop has its own.  A page and
 * its generation are only used with the region's lock held.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "agent.h"
#include "pagegen.h"

#define MAX_REGIONS 32
#define LOOP_ERRORS_KEPT 200
#define SCATTER 2

typedef enum {
    PATTERN_SIGNED, PATTERN_SAME, PATTERN_DUP, PATTERN_ZERO, PATTERN_MIXED,
} Pattern;

typedef struct Region {
    char id[16];
    uint64_t pages;
    uint8_t *mem;
    Pattern pattern;
    uint64_t arg;               /* the seed of "same", the K of "dup" */
    uint32_t *gen;              /* generation of each page */
    pthread_mutex_t lock;
    pthread_t thread;
    int looping;
    int stop;
    unsigned denominator;       /* the loop writes one page in so many */
    uint64_t passes;
    uint64_t errors;
    char first[LOOP_ERRORS_KEPT];
} Region;

static Region *regions[MAX_REGIONS];

static uint64_t pattern_key(const Region *r, Pattern p, uint64_t arg,
                            uint64_t i)
{
    uint64_t gen = r->gen[i];
    uint64_t self = pg_key(agent_vm_id, r->id[0] | r->id[1] << 8);

    switch (p) {
    case PATTERN_SAME:
        return pg_key(pg_key(arg, gen % 8), i);
    case PATTERN_DUP:
        return pg_key(pg_key(self, gen % 8), i % (r->pages / arg));
    case PATTERN_ZERO:
        if (gen % 2 == 0) {
            return 0;
        }
        break;
    case PATTERN_MIXED:
        switch (i / 16 % 4) {
        case 1:
            return pattern_key(r, PATTERN_SAME, 7, i);
        case 2:
            return pattern_key(r, PATTERN_DUP, 4, i);
        case 3:
            return pattern_key(r, PATTERN_ZERO, 0, i);
        }
        break;
    case PATTERN_SIGNED:
        break;
    }
    return pg_key(pg_key(self, i), 1 + gen);
}

static void *page_of(const Region *r, uint64_t i)
{
    return r->mem + i * PG_SIZE;
}

static void fill_locked(Region *r, uint64_t i)
{
    pg_fill(page_of(r, i), pattern_key(r, r->pattern, r->arg, i));
}

/* Check page @i; describe the first error that the region ever had. */
static int check_locked(Region *r, uint64_t i)
{
    uint64_t key = pattern_key(r, r->pattern, r->arg, i);
    long bad = pg_check(page_of(r, i), key);
    const uint64_t *w = page_of(r, i);

    if (bad < 0) {
        return 0;
    }
    if (r->errors++ == 0) {
        snprintf(r->first, sizeof(r->first),
                 "page=%llu gen=%u offset=%ld key=%llx word0=%llx found=%llx",
                 (unsigned long long)i, r->gen[i], bad,
                 (unsigned long long)key, (unsigned long long)w[0],
                 (unsigned long long)w[bad / sizeof(*w)]);
    }
    /* Repair it: each damage is counted once. */
    fill_locked(r, i);
    return -1;
}

static Region *region_find(const char *id)
{
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (regions[i] && !strcmp(regions[i]->id, id)) {
            return regions[i];
        }
    }
    return NULL;
}

static Region *region_arg(int argc, char **argv, int need, char *reply)
{
    Region *r;

    if (argc < need) {
        strcpy(reply, "too few arguments");
        return NULL;
    }
    r = region_find(argv[1]);
    if (!r) {
        snprintf(reply, AGENT_REPLY, "no region %s", argv[1]);
    }
    return r;
}

static int parse_pattern(Region *r, const char *name)
{
    static const char *const names[] = {
        [PATTERN_SIGNED] = "signed", [PATTERN_SAME] = "same",
        [PATTERN_DUP] = "dup", [PATTERN_ZERO] = "zero",
        [PATTERN_MIXED] = "mixed",
    };

    for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
        if (!strcmp(names[i], name)) {
            r->pattern = i;
            return 0;
        }
    }
    return -1;
}

static void region_free(Region *r)
{
    if (r->mem && r->mem != MAP_FAILED) {
        munmap(r->mem, r->pages * PG_SIZE);
    }
    free(r->gen);
    free(r);
}

/*
 * Page number @i of those to be filled.  Memory is taken in that order: in
 * steps of SCATTER pages that each guest takes in another order, so that equal
 * pages lie in other places, as after a guest has run for long.
 */
static uint64_t scattered(const Region *r, uint64_t i)
{
    uint64_t steps = r->pages / SCATTER;
    uint64_t step = i / SCATTER;

    if (step >= steps) {
        return i;
    }
    /* odd, so that with a power of two each comes once */
    step = step * (0x9e3779b1 + 2 * agent_vm_id) % steps;
    return step * SCATTER + i % SCATTER;
}

/* alloc ID PAGES PATTERN [ARG [huge|nohuge|scatter]] */
int region_alloc(int argc, char **argv, char *reply)
{
    Region *r;
    int scatter, slot = 0;

    while (slot < MAX_REGIONS && regions[slot]) {
        slot++;
    }
    if (argc < 4 || slot == MAX_REGIONS || region_find(argv[1]) ||
        strlen(argv[1]) >= sizeof(r->id)) {
        strcpy(reply, "usage: alloc NEW-ID PAGES PATTERN "
               "[ARG [huge|nohuge|scatter]]");
        return -1;
    }
    r = calloc(1, sizeof(*r));
    strcpy(r->id, argv[1]);
    r->arg = 2;
    if (agent_number(argv[2], &r->pages) || parse_pattern(r, argv[3]) ||
        (argc > 4 && agent_number(argv[4], &r->arg)) ||
        (r->pattern == PATTERN_DUP && (!r->arg || r->arg > r->pages)) ||
        (r->pattern == PATTERN_MIXED && r->pages < 4)) {
        strcpy(reply, "bad argument");
        free(r);
        return -1;
    }
    r->gen = calloc(r->pages, sizeof(*r->gen));
    r->mem = mmap(NULL, r->pages * PG_SIZE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!r->gen || r->mem == MAP_FAILED) {
        strcpy(reply, "out of memory");
        region_free(r);
        return -1;
    }
    if (argc > 5) {
        madvise(r->mem, r->pages * PG_SIZE,
                !strcmp(argv[5], "huge") ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    }
    pthread_mutex_init(&r->lock, NULL);
    scatter = argc > 5 && !strcmp(argv[5], "scatter");
    if (scatter && (r->pages & (r->pages - 1))) {
        strcpy(reply, "scatter: PAGES is a power of 2");
        region_free(r);
        return -1;
    }
    for (uint64_t i = 0; i < r->pages; i++) {
        fill_locked(r, scatter ? scattered(r, i) : i);
    }
    regions[slot] = r;
    snprintf(reply, AGENT_REPLY, "pages=%llu", (unsigned long long)r->pages);
    return 0;
}

/* verify ID: every byte; the errors include those that a loop found */
int region_verify(int argc, char **argv, char *reply)
{
    Region *r = region_arg(argc, argv, 2, reply);
    uint64_t bad = 0;

    if (!r) {
        return -1;
    }
    for (uint64_t i = 0; i < r->pages; i++) {
        pthread_mutex_lock(&r->lock);
        bad += check_locked(r, i) != 0;
        pthread_mutex_unlock(&r->lock);
    }
    snprintf(reply, AGENT_REPLY, "pages=%llu bad=%llu errors=%llu "
             "passes=%llu %s", (unsigned long long)r->pages,
             (unsigned long long)bad, (unsigned long long)r->errors,
             (unsigned long long)r->passes, r->first);
    return 0;
}

static void rewrite_page(Region *r, uint64_t i, uint32_t gen)
{
    pthread_mutex_lock(&r->lock);
    check_locked(r, i);
    r->gen[i] = gen;
    fill_locked(r, i);
    pthread_mutex_unlock(&r->lock);
}

/* rewrite ID GEN: check, then write every page as generation GEN */
int region_rewrite(int argc, char **argv, char *reply)
{
    Region *r = region_arg(argc, argv, 3, reply);
    uint64_t gen;

    if (!r) {
        return -1;
    }
    if (agent_number(argv[2], &gen)) {
        strcpy(reply, "bad generation");
        return -1;
    }
    for (uint64_t i = 0; i < r->pages; i++) {
        rewrite_page(r, i, gen);
    }
    snprintf(reply, AGENT_REPLY, "errors=%llu %s",
             (unsigned long long)r->errors, r->first);
    return 0;
}

/* touch ID N: check, then raise the generation of one page in N */
int region_touch(int argc, char **argv, char *reply)
{
    Region *r = region_arg(argc, argv, 3, reply);
    uint64_t step;

    if (!r) {
        return -1;
    }
    if (agent_number(argv[2], &step) || !step) {
        strcpy(reply, "bad fraction");
        return -1;
    }
    for (uint64_t i = 0; i < r->pages; i += step) {
        rewrite_page(r, i, r->gen[i] + 1);
    }
    snprintf(reply, AGENT_REPLY, "errors=%llu %s",
             (unsigned long long)r->errors, r->first);
    return 0;
}

static void *loop_thread(void *opaque)
{
    Region *r = opaque;
    uint64_t state = pg_key((uintptr_t)r, agent_vm_id);

    while (!__atomic_load_n(&r->stop, __ATOMIC_RELAXED)) {
        for (uint64_t i = 0; i < r->pages; i++) {
            if (__atomic_load_n(&r->stop, __ATOMIC_RELAXED)) {
                return NULL;
            }
            pthread_mutex_lock(&r->lock);
            check_locked(r, i);
            if (agent_random(&state) % r->denominator == 0) {
                r->gen[i]++;
                fill_locked(r, i);
                check_locked(r, i);
            }
            pthread_mutex_unlock(&r->lock);
        }
        __atomic_add_fetch(&r->passes, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* loop ID start [N] | stop: check all and write one page in N, for ever */
int region_loop(int argc, char **argv, char *reply)
{
    Region *r = region_arg(argc, argv, 3, reply);
    uint64_t n = 8;

    if (!r) {
        return -1;
    }
    if (argc > 3 && (agent_number(argv[3], &n) || !n)) {
        strcpy(reply, "bad fraction");
        return -1;
    }
    if (!strcmp(argv[2], "start") && !r->looping) {
        r->denominator = n;
        r->stop = 0;
        r->looping = !pthread_create(&r->thread, NULL, loop_thread, r);
    } else if (!strcmp(argv[2], "stop") && r->looping) {
        __atomic_store_n(&r->stop, 1, __ATOMIC_RELAXED);
        pthread_join(r->thread, NULL);
        r->looping = 0;
    }
    snprintf(reply, AGENT_REPLY, "looping=%d passes=%llu errors=%llu %s",
             r->looping,
             (unsigned long long)__atomic_load_n(&r->passes, __ATOMIC_RELAXED),
             (unsigned long long)r->errors, r->first);
    return 0;
}

/* drop ID: unmap the region */
int region_drop(int argc, char **argv, char *reply)
{
    Region *r = region_arg(argc, argv, 2, reply);

    if (!r) {
        return -1;
    }
    if (r->looping) {
        strcpy(reply, "the loop is running");
        return -1;
    }
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (regions[i] == r) {
            regions[i] = NULL;
        }
    }
    region_free(r);
    return 0;
}

/* list: the figures of every region, without a check */
int region_list(int argc, char **argv, char *reply)
{
    uint64_t pages = 0, passes = 0, errors = 0;
    int n = 0;

    for (int i = 0; i < MAX_REGIONS; i++) {
        if (regions[i]) {
            n++;
            pages += regions[i]->pages;
            passes += __atomic_load_n(&regions[i]->passes, __ATOMIC_RELAXED);
            errors += __atomic_load_n(&regions[i]->errors, __ATOMIC_RELAXED);
        }
    }
    snprintf(reply, AGENT_REPLY, "regions=%d pages=%llu passes=%llu "
             "errors=%llu", n, (unsigned long long)pages,
             (unsigned long long)passes, (unsigned long long)errors);
    return 0;
}
