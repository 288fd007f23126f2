/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is to be done; see todo.h.
 */

#include <errno.h>
#include <string.h>

#include "scan/todo.h"
#include "space/array.h"

/* Do them when there are so many: 64 MiB, a fair part of a small guest. */
#define TASKS_FULL 16384
/* No more than so many may be told by others, before they are looked at. */
#define TOLD_MOST 65536
/*
 * Nor more be kept that cannot be done yet; they are looked at again and again,
 * at longer and longer intervals, up to this.
 */
#define KEPT_MOST 65536
#define PAUSE_US (16 * G_TIME_SPAN_SECOND)
/*
 * Or when nothing was found, or told, for some time: others are at full speed,
 * and the fewer windows the better.  But not for longer than this.
 */
#define QUIET_US (50 * G_TIME_SPAN_MILLISECOND)
#define WAIT_US (500 * G_TIME_SPAN_MILLISECOND)

/* So there never are more: who adds a chunk's looks whether that are enough. */
#define TASKS_MOST (KEPT_MOST + TASKS_FULL + TOLD_MOST + 16 * DEDUP_CHUNK_PAGES)

/* ---- lists ---- */

static bool tasks_init(DedupTasks *l)
{
    l->task = dedup_array_new(TASKS_MOST * sizeof(l->task[0]));
    l->n = 0;
    return l->task;
}

static void tasks_clear(DedupTasks *l)
{
    dedup_array_free(l->task, TASKS_MOST * sizeof(l->task[0]));
}

/* What does not fit is found again by the next pass. */
static void tasks_add(DedupTasks *l, const DedupTask *task, unsigned n)
{
    n = MIN(n, TASKS_MOST - l->n);
    memcpy(l->task + l->n, task, n * sizeof(*task));
    l->n += n;
}

/* All but the first @n: they give their memory back, too. */
static void tasks_cut(DedupTasks *l, unsigned n)
{
    size_t used = (n * sizeof(l->task[0]) + DEDUP_PAGE_SIZE - 1) &
                  -DEDUP_PAGE_SIZE;

    dedup_array_forget((uint8_t *)l->task + used,
                       TASKS_MOST * sizeof(l->task[0]) - used);
    l->n = n;
}

static uint64_t tasks_bytes(const DedupTasks *l)
{
    return dedup_array_resident(l->task, TASKS_MOST * sizeof(l->task[0]));
}

/* ---- the list ---- */

/* A new one: for the first of them, or after a pause, whatever comes first. */
static void note_time(DedupTodo *todo, int64_t now)
{
    int64_t since = __atomic_load_n(&todo->since_us, __ATOMIC_RELAXED);

    if (!since) {
        since = now;
        __atomic_store_n(&todo->since_us, now, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&todo->due_us, MIN(since + WAIT_US, now + QUIET_US),
                     __ATOMIC_RELAXED);
}

static void add(DedupScan *scan, const DedupRegion *r, DedupTask task)
{
    task.page += dedup_region_base(r);
    task.pass = scan->pass;
    note_time(&scan->todo, scan->now_us);
    tasks_add(&scan->todo.tasks, &task, 1);
}

void dedup_todo_add(DedupScan *scan, const DedupRegion *r, uint32_t page,
                    uint64_t hash, bool stable)
{
    add(scan, r, (DedupTask) {
        .page = page, .hash = hash, .stable = stable,
    });
}

void dedup_todo_add_zero(DedupScan *scan, const DedupRegion *r, uint32_t page)
{
    add(scan, r, (DedupTask) { .page = page, .zero = true, .stable = true });
}

void dedup_scan_tell(DedupScan *scan, uint32_t member_page, uint64_t hash)
{
    DedupTodo *todo = &scan->todo;
    DedupTask task = { .hash = hash, .page = member_page, .told = true };
    bool first;

    g_mutex_lock(&todo->lock);
    first = !todo->told.n;
    if (todo->told.n < TOLD_MOST) {
        tasks_add(&todo->told, &task, 1);
    }
    note_time(todo, g_get_monotonic_time());
    g_mutex_unlock(&todo->lock);
    if (first) {
        /* it may sleep for long */
        dedup_control_nudge(scan->control);
    }
}

/* What others have said becomes ours to do. */
static void take_told(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_mutex_lock(&todo->lock);
    for (unsigned i = 0; i < todo->told.n; i++) {
        todo->told.task[i].pass = scan->pass;
    }
    if (todo->told.n) {
        tasks_add(&todo->tasks, todo->told.task, todo->told.n);
        tasks_cut(&todo->told, 0);
    }
    g_mutex_unlock(&todo->lock);
}

int64_t dedup_scan_waits_us(const DedupScan *scan)
{
    const DedupTodo *todo = &scan->todo;
    int64_t due = __atomic_load_n(&todo->due_us, __ATOMIC_RELAXED);

    if (!due) {
        return INT64_MAX;
    }
    return todo->tasks.n >= todo->kept + TASKS_FULL ? 0 :
           MAX(due - g_get_monotonic_time(), 0);
}

static int compare(const void *a, const void *b)
{
    const DedupTask *x = a;
    const DedupTask *y = b;

    return x->page < y->page ? -1 : x->page > y->page;
}

DedupTask *dedup_todo_take(DedupScan *scan, unsigned *n)
{
    DedupTasks *tasks = &scan->todo.tasks;

    take_told(scan);
    qsort(tasks->task, tasks->n, sizeof(tasks->task[0]), compare);
    *n = tasks->n;
    return tasks->task;
}

/* What is kept waits again; what was told meanwhile goes on to wait. */
static void rest_of_them(DedupTodo *todo)
{
    int64_t now = g_get_monotonic_time();

    g_mutex_lock(&todo->lock);
    if (!todo->told.n) {
        __atomic_store_n(&todo->since_us, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&todo->due_us, todo->kept ? now + todo->pause_us : 0,
                         __ATOMIC_RELAXED);
    }
    g_mutex_unlock(&todo->lock);
}

void dedup_todo_keep(DedupScan *scan, unsigned n)
{
    DedupTodo *todo = &scan->todo;
    bool more = n < todo->tasks.n;

    n = MIN(n, KEPT_MOST); /* the next pass finds the others */
    tasks_cut(&todo->tasks, n);
    todo->kept = n;
    todo->pause_us = more || !n ? WAIT_US : MIN(2 * todo->pause_us, PAUSE_US);
    rest_of_them(todo);
}

void dedup_todo_forget(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    tasks_cut(&todo->tasks, 0);
    todo->kept = 0;
    todo->pause_us = WAIT_US;
    rest_of_them(todo);
}

void dedup_todo_forget_told(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_mutex_lock(&todo->lock);
    tasks_cut(&todo->told, 0);
    g_mutex_unlock(&todo->lock);
}

/* ---- life ---- */

bool dedup_todo_init(DedupScan *scan, GError **error)
{
    DedupTodo *todo = &scan->todo;
    bool ok = tasks_init(&todo->tasks) && tasks_init(&todo->told);

    g_mutex_init(&todo->lock);
    todo->actions = g_new(DedupAction, DEDUP_CHUNK_PAGES);
    todo->pause_us = WAIT_US;
    if (!ok) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "cannot map a list of tasks: %s", g_strerror(errno));
        dedup_todo_clear(scan);
    }
    return ok;
}

void dedup_todo_clear(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_free(todo->actions);
    tasks_clear(&todo->told);
    tasks_clear(&todo->tasks);
    g_mutex_clear(&todo->lock);
}

uint64_t dedup_todo_bytes(const DedupScan *scan)
{
    return tasks_bytes(&scan->todo.tasks) + tasks_bytes(&scan->todo.told) +
           DEDUP_CHUNK_PAGES * sizeof(DedupAction);
}
