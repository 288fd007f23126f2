/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is to be done; see todo.h.
 */

#include "scan/todo.h"

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
    g_array_append_val(scan->todo.tasks, task);
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
    first = !todo->told->len;
    if (todo->told->len < TOLD_MOST) {
        g_array_append_val(todo->told, task);
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
    for (unsigned i = 0; i < todo->told->len; i++) {
        DedupTask *task = &g_array_index(todo->told, DedupTask, i);

        task->pass = scan->pass;
    }
    g_array_append_vals(todo->tasks, todo->told->data, todo->told->len);
    if (todo->told->len) {
        g_array_free(todo->told, true);
        todo->told = g_array_new(false, false, sizeof(DedupTask));
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
    return todo->tasks->len >= todo->kept + TASKS_FULL ? 0 :
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
    GArray *tasks = scan->todo.tasks;

    take_told(scan);
    g_array_sort(tasks, compare);
    *n = tasks->len;
    return (DedupTask *)tasks->data;
}

/* What is kept waits again; what was told meanwhile goes on to wait. */
static void rest_of_them(DedupTodo *todo)
{
    int64_t now = g_get_monotonic_time();

    g_mutex_lock(&todo->lock);
    if (!todo->told->len) {
        __atomic_store_n(&todo->since_us, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&todo->due_us, todo->kept ? now + todo->pause_us : 0,
                         __ATOMIC_RELAXED);
    }
    g_mutex_unlock(&todo->lock);
}

void dedup_todo_keep(DedupScan *scan, unsigned n)
{
    DedupTodo *todo = &scan->todo;
    bool more = n < todo->tasks->len;

    n = MIN(n, KEPT_MOST); /* the next pass finds the others */
    g_array_set_size(todo->tasks, n);
    todo->kept = n;
    todo->pause_us = more ? WAIT_US : MIN(2 * todo->pause_us, PAUSE_US);
    if (n) {
        rest_of_them(todo);
    } else {
        /* the memory, too */
        dedup_todo_forget(scan);
    }
}

void dedup_todo_forget(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_array_free(todo->tasks, true);
    todo->tasks = g_array_new(false, false, sizeof(DedupTask));
    todo->kept = 0;
    todo->pause_us = WAIT_US;
    rest_of_them(todo);
}

void dedup_todo_forget_told(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_mutex_lock(&todo->lock);
    g_array_set_size(todo->told, 0);
    g_mutex_unlock(&todo->lock);
}

/* ---- life ---- */

void dedup_todo_init(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_mutex_init(&todo->lock);
    todo->tasks = g_array_new(false, false, sizeof(DedupTask));
    todo->told = g_array_new(false, false, sizeof(DedupTask));
    todo->actions = g_new(DedupAction, DEDUP_CHUNK_PAGES);
    todo->pause_us = WAIT_US;
}

void dedup_todo_clear(DedupScan *scan)
{
    DedupTodo *todo = &scan->todo;

    g_free(todo->actions);
    g_array_free(todo->told, true);
    g_array_free(todo->tasks, true);
    g_mutex_clear(&todo->lock);
}

uint64_t dedup_todo_bytes(const DedupScan *scan)
{
    return (scan->todo.tasks->len + scan->todo.told->len) * sizeof(DedupTask) +
           DEDUP_CHUNK_PAGES * sizeof(DedupAction);
}
