/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How fast the scanner goes; see pace.h.
 */

#include "host/clock.h"
#include "scan/pace.h"

#define CORE 1000             /* permille of a core */

/* A pass that finds one of so many of the pages that it looks at finds much. */
#define YIELD_SHARE 64
/* Then the next one is so many times as fast; else half as fast. */
#define HURRY 4
/* A pass with so many times the work of the one before was not paced by it. */
#define GROWN 2
/* But for the first, a pass takes a second: sooner little can be new. */
#define LEAST_US G_TIME_SPAN_SECOND
#define FULL_SPEED 2

/* Batches: what is looked at between two looks at what is asked. */
#define BATCH_FAST 16384
#define BATCH_LEAST DEDUP_CHUNK_PAGES
#define BATCH_US 20000
/* A batch comes at least that often: others may have told us something. */
#define REST_MOST_US (2 * G_TIME_SPAN_SECOND)

/* What may be saved up of CPU time, or be owed, and what counts at a time. */
#define CREDIT_NS (20 * INT64_C(1000000))
#define DEBT_NS (5 * INT64_C(1000000000))
#define STEP_NS (10 * INT64_C(1000000000))
/* How often the share is looked at, and how short memory is. */
#define SHARE_NS (200 * INT64_C(1000000))
#define TARGET_NS INT64_C(1000000000)
/* Whoever is in the group may spend a little. */
#define SHARE_LEAST 1

/* ---- what may be spent ---- */

static int64_t spent_ns(const DedupPace *p)
{
    return dedup_thread_cpu_ns() + (int64_t)dedup_group_cpu_ns(p->group);
}

typedef struct Wishes {
    uint32_t wants[DEDUP_MAX_MEMBERS];  /* of the others */
    unsigned n;
} Wishes;

static void add_wish(void *opaque, unsigned member, bool self,
                     const DedupMemberInfo *info)
{
    Wishes *w = opaque;

    if (!self && info->scanning) {
        w->wants[w->n++] = MIN(info->cpu_wanted, CORE);
    }
}

/*
 * Our part of @all: an equal one, and what others leave of theirs.  Goes on
 * until nobody new is found who wants less than is left for each.
 */
static uint32_t fair_share(const Wishes *w, uint32_t all)
{
    bool served[DEDUP_MAX_MEMBERS] = { false };
    uint32_t left = all, n = w->n + 1;
    bool more = true;

    while (more) {
        more = false;
        for (unsigned i = 0; i < w->n; i++) {
            if (!served[i] && w->wants[i] < left / n) {
                served[i] = more = true;
                left -= w->wants[i];
                n--;
            }
        }
    }
    return MAX(left / n, SHARE_LEAST);
}

static void find_share(DedupPace *p, const DedupParams *params)
{
    Wishes w = { .n = 0 };

    p->share = CORE;
    if (params->max_cpu) {
        dedup_group_foreach_member(p->group, add_wish, &w);
        p->share = fair_share(&w, params->max_cpu * (CORE / 100));
    }
    if (params->max_cpu_vm) {
        p->share = MIN(p->share, params->max_cpu_vm * (CORE / 100));
    }
    p->share = MIN(p->share, CORE);
}

/* Time passes, CPU time is spent: how long until we may go on? */
static int64_t pay(DedupPace *p, const DedupParams *params)
{
    int64_t wall = dedup_now_ns();
    int64_t cpu = spent_ns(p);
    int64_t passed = p->wall_ns ? MIN(wall - p->wall_ns, STEP_NS) : 0;

    if (!p->share || wall - p->share_ns > SHARE_NS) {
        p->share_ns = wall;
        find_share(p, params);
    }
    p->credit_ns += passed * p->share / CORE -
                    (p->wall_ns ? cpu - p->cpu_ns : 0);
    p->credit_ns = CLAMP(p->credit_ns, -DEBT_NS * p->share / CORE,
                         CREDIT_NS * p->share / CORE);
    p->wall_ns = wall;
    p->cpu_ns = cpu;
    return p->credit_ns < 0 && p->share < CORE ?
           -p->credit_ns * CORE / p->share / 1000 : 0;
}

/* ---- how long a pass is to take ---- */

static int64_t target_us(DedupPace *p, const DedupParams *params)
{
    int64_t target = params->target_scan_s * G_TIME_SPAN_SECOND;
    unsigned pressure;

    if (params->advisor != DEDUP_ADVISOR_PRESSURE) {
        return target;
    }
    /* next to nothing while there is plenty, at full speed when it is short */
    pressure = dedup_pressure(&p->pressure);
    return pressure ? target * (100 - pressure) / 100
                    : target * DEDUP_PLENTY_FACTOR;
}

/* One that is to take no longer than it must, or little more, just runs. */
static void choose(DedupPace *p)
{
    p->scan_us = p->wish_us < FULL_SPEED * p->pass_cpu_ns / 1000 ? 0
                                                                 : p->wish_us;
    __atomic_store_n(&p->wants, p->scan_us ?
                     MIN(p->pass_cpu_ns / p->scan_us + 1, CORE) : CORE,
                     __ATOMIC_RELAXED);
}

void dedup_pace_pass(DedupPace *p, const DedupParams *params,
                     const DedupTally *tally)
{
    int64_t cpu = spent_ns(p);
    int64_t target = target_us(p, params);

    p->pass_cpu_ns = MAX(cpu - p->pass_start_ns, 1);
    p->pass_start_ns = cpu;
    p->pass_work = MAX(tally->work, 1);
    p->wish_us = tally->found * YIELD_SHARE > tally->hashed ?
                 p->wish_us / HURRY : 2 * p->wish_us;
    p->wish_us = MIN(MAX(p->wish_us, LEAST_US), target);
    choose(p);
}

void dedup_pace_grown(DedupPace *p, uint64_t work)
{
    if (p->scan_us && work > GROWN * p->pass_work + BATCH_LEAST) {
        p->scan_us = 0;
        __atomic_store_n(&p->wants, CORE, __ATOMIC_RELAXED);
    }
}

/* Memory may run short long before a slow pass ends. */
static void follow_target(DedupPace *p, const DedupParams *params)
{
    int64_t now = dedup_now_ns();

    if (params->advisor == DEDUP_ADVISOR_PRESSURE && p->scan_us &&
        now - p->target_ns > TARGET_NS) {
        p->target_ns = now;
        p->wish_us = MIN(p->wish_us, target_us(p, params));
        choose(p);
    }
}

void dedup_pace_hurry(DedupPace *p)
{
    __atomic_store_n(&p->hurry, true, __ATOMIC_RELAXED);
}

uint32_t dedup_pace_wants(const DedupPace *p)
{
    return __atomic_load_n(&p->wants, __ATOMIC_RELAXED);
}

/* ---- batches ---- */

/* Pages in @us at this pace, within what the parameters allow. */
static double pages_in(const DedupPace *p, const DedupParams *params,
                       int64_t us)
{
    double pages = (double)p->pass_work * us / p->scan_us;
    double sleep_us = params->sleep_millisecs * 1000.0;

    if (sleep_us > 0) {
        pages = MAX(pages, params->min_pages * (us / sleep_us));
        pages = params->max_pages ?
                MIN(pages, params->max_pages * (us / sleep_us)) : pages;
    }
    return pages;
}

uint32_t dedup_pace_batch(DedupPace *p, const DedupParams *params)
{
    if (__atomic_exchange_n(&p->hurry, false, __ATOMIC_RELAXED)) {
        p->wish_us = p->scan_us = 0;
        __atomic_store_n(&p->wants, CORE, __ATOMIC_RELAXED);
    }
    if (params->advisor == DEDUP_ADVISOR_NONE) {
        p->batch = params->pages_to_scan;
    } else if (!p->scan_us) {
        /* who may spend little owes the less for it */
        p->batch = MAX((uint64_t)BATCH_FAST * (p->share ? p->share : CORE) /
                       CORE, BATCH_LEAST);
    } else {
        p->batch = CLAMP(pages_in(p, params, BATCH_US), BATCH_LEAST,
                         BATCH_FAST);
    }
    return p->batch;
}

int64_t dedup_pace_rest(DedupPace *p, const DedupParams *params)
{
    int64_t rest = 0;

    if (params->advisor == DEDUP_ADVISOR_NONE) {
        return params->sleep_millisecs * 1000LL;
    }
    follow_target(p, params);
    if (p->scan_us) {
        rest = BATCH_US * (double)p->batch / pages_in(p, params, BATCH_US);
    }
    return MIN(MAX(rest, pay(p, params)), REST_MOST_US);
}

void dedup_pace_init(DedupPace *p, DedupGroup *group, DedupHostMem *hostmem)
{
    *p = (DedupPace) { .group = group, .wants = CORE };
    dedup_pressure_open(&p->pressure, hostmem, "/proc");
}

void dedup_pace_clear(DedupPace *p)
{
    dedup_pressure_close(&p->pressure);
}
