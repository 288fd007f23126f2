/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the rest of QEMU tells whoever replaces guest RAM under a running VM
 *
 * Three small mechanisms that know nothing of deduplication; see
 * hw/dedup/ram-guard.h for what they are for.
 *
 * DMA counters.  A page that the kernel has pinned for a transfer in flight
 * (O_DIRECT, io_uring, vmsplice) must not be replaced.  What is written
 * would land in the page that was thrown away.  What is read is safe as long
 * as the old page keeps its bytes, but giving back a part of a large folio
 * of shared memory zeroes that part in place while somebody holds the folio
 * (Linux 6.18), and zeros would go to the disk.  So reads have counters of
 * their own: some are mapped for as long as the VM lives, and forbid no more
 * than giving memory of a file back.  Every buffer of that kind
 * comes from address_space_map() and goes to address_space_unmap(), so these
 * two count, per chunk of each block.  What does not need counting:
 *
 * - MemoryRegionCache, address_space_rw(), memory_region_get_ram_ptr():
 *   stores through page tables, which wait like a vCPU's;
 * - read(2) into guest RAM by an incoming migration: nothing is replaced
 *   before that has ended;
 * - mappings that last as long as a device runs and that are written in the
 *   same way: vhost's rings, by the kernel's copy_to_user(), and the lists of
 *   an AHCI port; ram_guard_dma_exempt() takes them back;
 * - vfio, vdpa, iommufd, nvme://, blkio, RDMA: pin for good, and disable
 *   discards (ram_block_discard_disable()), which excludes replacing;
 * - migration with zero-copy or to and from a file with direct I/O: nothing
 *   is replaced until it has ended.
 *
 * The counters are kept for every block from its birth, whether somebody
 * replaces RAM or not: counters that start with I/O in flight would be wrong
 * for as long as the VM lives.  They fail only to the safe side.  Unmapping
 * less than was mapped leaves a chunk counted; a counter at its maximum
 * stays there; a counter at zero is not lowered.
 *
 * The order that makes them safe: the mapper raises (a full barrier), then
 * the I/O is submitted and the kernel pins.  The replacer takes write access
 * away, passes a full barrier, then reads.  Either it sees the counter
 * raised, or the pin is attempted after access was taken away and waits for
 * it like any other writer.
 *
 * Kernel writers.  Where write access is taken away in a way that makes a
 * system call fail, and not wait, a mapper that writes waits himself, after he
 * has raised his counter; the replacer, who has said before that he is about
 * to, takes no access to what is counted.  Threads of the kernel that write by
 * themselves, and go through page tables (vhost), cannot be made to wait so:
 * they are on a list, and the replacer finds another way, or stops.
 *
 * Discards.  The registered one may have put foreign mappings over a block.
 * Discarding those would bring the foreign contents back instead of zeros,
 * so it is asked first to put the block's own mapping in place, and to leave
 * it there until the memory is gone.
 *
 * Whole RAM.  A counted list of users' names per block, and one for all RAM.
 * All of it is protected by the BQL.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"
#include "trace/trace-hw_dedup.h"

typedef struct RamGuard {
    struct rcu_head rcu;
    const RamGuardOps *ops;
    void *opaque;
    /* Threads that are in a callback without the BQL: a discard each */
    unsigned visitors;
    QemuEvent left;
} RamGuard;

/* Written under the BQL, read under RCU or the BQL. */
static RamGuard *guard;

/* Of who is registered; atomic. */
static const unsigned no_windows;
static const unsigned *windows = &no_windows;

/* Bytes that devices may take; atomic. */
static uint64_t may_take;

/* Names, one for each get that was not put yet.  BQL. */
static GQueue kernel_writers = G_QUEUE_INIT;

/* One entry for each get that was not put yet.  BQL. */
struct RamGuardUser {
    RAMBlock *rb;
    char *name;
    QTAILQ_ENTRY(RamGuardUser) next;
};

static QTAILQ_HEAD(, RamGuardUser) whole_users =
    QTAILQ_HEAD_INITIALIZER(whole_users);

/* How many callbacks are running that may release it.  BQL. */
static unsigned whole_busy;

bool ram_guard_register(const RamGuardOps *ops, void *opaque)
{
    RamGuard *new;

    assert(bql_locked());
    if (guard) {
        return false;
    }
    new = g_new0(RamGuard, 1);
    new->ops = ops;
    new->opaque = opaque;
    qemu_event_init(&new->left, false);
    qatomic_rcu_set(&guard, new);
    if (ops->windows) {
        qatomic_set(&windows, ops->windows);
    }
    return true;
}

static void guard_free(RamGuard *g)
{
    qemu_event_destroy(&g->left);
    g_free(g);
}

/*
 * Whoever calls back without the BQL is a visitor: from then on it is waited
 * for before the one who replaces RAM goes.  Not by RCU: a grace period waits
 * for vCPUs in their read sections, and those may wait for the BQL that the
 * waiter holds.
 */
static RamGuard *guard_enter(void)
{
    RamGuard *g;

    RCU_READ_LOCK_GUARD();
    g = qatomic_rcu_read(&guard);
    if (!g) {
        return NULL;
    }
    qatomic_inc(&g->visitors);
    /* Pairs with the barrier in ram_guard_unregister(). */
    smp_mb__after_rmw();
    if (qatomic_read(&guard) == g) {
        return g;
    }
    if (qatomic_fetch_dec(&g->visitors) == 1) {
        qemu_event_set(&g->left);
    }
    return NULL;
}

static void guard_leave(RamGuard *g)
{
    /* It may be freed as soon as nobody visits it. */
    RCU_READ_LOCK_GUARD();
    if (qatomic_fetch_dec(&g->visitors) == 1) {
        qemu_event_set(&g->left);
    }
}

void ram_guard_unregister(void)
{
    RamGuard *old = guard;

    assert(bql_locked());
    assert(old && !whole_busy);
    qatomic_set(&windows, &no_windows);
    qatomic_rcu_set(&guard, NULL);
    /* Pairs with the barrier in guard_enter(). */
    smp_mb();
    /* A visitor takes no BQL: it is between two system calls. */
    while (qatomic_read(&old->visitors)) {
        qemu_event_reset(&old->left);
        if (qatomic_read(&old->visitors)) {
            qemu_event_wait(&old->left);
        }
    }
    call_rcu(old, guard_free, rcu);
}

bool ram_guard_whole_busy(void)
{
    assert(bql_locked());
    return whole_busy;
}

void ram_guard_block_add(RAMBlock *rb)
{
    /* They cost memory where there is I/O, or where somebody replaces RAM. */
    for (int i = 0; i < ARRAY_SIZE(rb->dma_maps); i++) {
        rb->dma_maps[i] = g_new0(uint16_t,
                                 DIV_ROUND_UP(rb->max_length, 1ULL <<
                                              RAM_GUARD_CHUNK_SHIFT));
    }
}

void ram_guard_block_free(RAMBlock *rb)
{
    for (int i = 0; i < ARRAY_SIZE(rb->dma_maps); i++) {
        g_clear_pointer(&rb->dma_maps[i], g_free);
    }
}

const uint16_t *ram_guard_dma_maps(const RAMBlock *rb, bool is_write)
{
    return rb->dma_maps[is_write];
}

/*
 * Both changes are read-modify-writes with full barriers, of which the
 * raising one pairs with the barrier between "write access is taken away"
 * and the replacer's read.
 */
static void counter_raise(uint16_t *counter)
{
    uint16_t old = qatomic_read(counter), seen;

    while (old != UINT16_MAX) {
        seen = qatomic_cmpxchg(counter, old, old + 1);
        if (seen == old) {
            return;
        }
        old = seen;
    }
    /* Nothing was written here, and yet the caller relies on the order. */
    smp_mb();
}

static void counter_lower(uint16_t *counter)
{
    uint16_t old = qatomic_read(counter), seen;

    while (old != 0 && old != UINT16_MAX) {
        seen = qatomic_cmpxchg(counter, old, old - 1);
        if (seen == old) {
            return;
        }
        old = seen;
    }
}

static void counters_change(RAMBlock *rb, ram_addr_t start, ram_addr_t length,
                            bool is_write, void (*change)(uint16_t *))
{
    ram_addr_t chunk, last;

    if (!length || start >= rb->max_length) {
        return;
    }
    last = MIN(start + length, rb->max_length) - 1;
    for (chunk = start >> RAM_GUARD_CHUNK_SHIFT;
         chunk <= last >> RAM_GUARD_CHUNK_SHIFT; chunk++) {
        change(&rb->dma_maps[is_write][chunk]);
    }
}

/*
 * The kernel is about to write there, and there is a window somewhere: wait
 * for the one that it would meet.  A window that begins later sees the counter.
 */
static void wait_window(void *host, ram_addr_t length)
{
    RamGuard *g = guard_enter();

    if (g) {
        g->ops->wait_window(g->opaque, host, length);
        guard_leave(g);
    }
}

void ram_guard_dma_map(RAMBlock *rb, ram_addr_t start, ram_addr_t length,
                       bool is_write)
{
    counters_change(rb, start, length, is_write, counter_raise);
    if (is_write && unlikely(qatomic_read(qatomic_read(&windows)))) {
        wait_window(rb->host + start, length);
    }
}

void ram_guard_dma_unmap(RAMBlock *rb, ram_addr_t start, ram_addr_t length,
                         bool is_write)
{
    counters_change(rb, start, length, is_write, counter_lower);
}

static void host_counters_change(void *ptr, ram_addr_t length, bool is_write,
                                 void (*change)(uint16_t *))
{
    RAMBlock *rb;
    ram_addr_t offset;

    RCU_READ_LOCK_GUARD();
    /* Not in RAM: a bounce buffer, or the map failed. */
    rb = ptr ? qemu_ram_block_from_host(ptr, false, &offset) : NULL;
    if (rb) {
        counters_change(rb, offset, length, is_write, change);
    }
}

void ram_guard_dma_exempt(void *ptr, ram_addr_t length, bool is_write)
{
    host_counters_change(ptr, length, is_write, counter_lower);
}

void ram_guard_dma_unexempt(void *ptr, ram_addr_t length, bool is_write)
{
    host_counters_change(ptr, length, is_write, counter_raise);
}

bool ram_guard_discard_begin(RamGuardDiscard *d, RAMBlock *rb,
                             ram_addr_t start, size_t length)
{
    /* A visitor until the end: so the one who replaces stays registered. */
    RamGuard *g = guard_enter();

    d->guard = NULL;
    if (!g) {
        return true;
    }
    if (g->ops->discard_begin(g->opaque, rb, start, length)) {
        d->guard = g;
        return true;
    }
    guard_leave(g);
    return false;
}

bool ram_guard_discard_host_begin(RamGuardDiscard *d, void *host,
                                  size_t length)
{
    RAMBlock *rb;
    ram_addr_t offset;

    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(host, false, &offset);
    if (!rb) {
        d->guard = NULL;
        return true;
    }
    return ram_guard_discard_begin(d, rb, offset, length);
}

void ram_guard_hold(RamGuardDiscard *d)
{
    ram_guard_discard_begin(d, NULL, 0, 0);
}

static bool needs_discards(void)
{
    RamGuard *g = guard_enter();
    bool needs = g && g->ops->needs_discards(g->opaque);

    if (g) {
        guard_leave(g);
    }
    return needs;
}

void ram_guard_explain_busy(void)
{
    if (needs_discards()) {
        error_report("dedup-scanner needs memory discards: to use a device "
                     "that cannot bear them, run dedup-unmerge and wait for "
                     "its end first");
    }
}

const char *ram_guard_busy_hint(void)
{
    return needs_discards() ? ", run dedup-unmerge first" : "";
}

void ram_guard_discard_end(RamGuardDiscard *d)
{
    RamGuard *g = d->guard;

    if (g) {
        d->guard = NULL;
        g->ops->discard_end(g->opaque);
        guard_leave(g);
    }
}

static unsigned whole_count(const RAMBlock *rb)
{
    RamGuardUser *u;
    unsigned n = 0;

    QTAILQ_FOREACH(u, &whole_users, next) {
        n += u->rb == rb;
    }
    return n;
}

void ram_guard_whole_put(RamGuardUser **user)
{
    RamGuardUser *u = *user;

    assert(bql_locked());
    if (!u) {
        return;
    }
    *user = NULL;
    QTAILQ_REMOVE(&whole_users, u, next);
    trace_ram_guard_whole_put(u->name, whole_count(u->rb));
    if (guard && !whole_count(u->rb)) {
        guard->ops->whole_end(guard->opaque, u->rb);
    }
    g_free(u->name);
    g_free(u);
}

bool ram_guard_whole_get(RamGuardUser **user, RAMBlock *rb, const char *name,
                         Error **errp)
{
    ERRP_GUARD();
    RamGuardUser *u;
    bool ok = true;

    assert(bql_locked());
    assert(!*user);
    /* On the list first: who looks while we wait leaves the RAM alone. */
    u = *user = g_new0(RamGuardUser, 1);
    u->rb = rb;
    u->name = g_strdup(name);
    QTAILQ_INSERT_TAIL(&whole_users, u, next);

    if (guard) {
        whole_busy++;
        ok = guard->ops->whole_begin(guard->opaque, rb, errp);
        whole_busy--;
    }
    trace_ram_guard_whole_get(name, whole_count(rb), ok);
    if (!ok) {
        error_prepend(errp, "%s needs guest RAM that is not merged: ", name);
        ram_guard_whole_put(user);
    }
    return ok;
}

bool ram_guard_prepare_remove(RAMBlock *rb, Error **errp)
{
    bool ok = true;

    assert(bql_locked());
    if (guard) {
        whole_busy++;
        ok = guard->ops->prepare_remove(guard->opaque, rb, errp);
        whole_busy--;
    }
    return ok;
}

bool ram_guard_is_whole(const RAMBlock *rb)
{
    assert(bql_locked());
    return whole_count(NULL) || (rb && whole_count(rb));
}

char *ram_guard_whole_users(const RAMBlock *rb)
{
    g_autoptr(GString) names = g_string_new(NULL);
    RamGuardUser *u;

    assert(bql_locked());
    QTAILQ_FOREACH(u, &whole_users, next) {
        if (u->rb == rb) {
            g_string_append_printf(names, "%s%s", names->len ? ", " : "",
                                   u->name);
        }
    }
    return names->len ? g_string_free(g_steal_pointer(&names), false) : NULL;
}

static void kernel_writers_changed(void)
{
    if (guard && guard->ops->kernel_writers_changed) {
        guard->ops->kernel_writers_changed(guard->opaque);
    }
}

void ram_guard_kernel_writer_get(const char *name)
{
    assert(bql_locked());
    g_queue_push_tail(&kernel_writers, g_strdup(name));
    kernel_writers_changed();
}

void ram_guard_kernel_writer_put(const char *name)
{
    GList *link;

    assert(bql_locked());
    link = g_queue_find_custom(&kernel_writers, name, (GCompareFunc)strcmp);
    assert(link);
    g_free(link->data);
    g_queue_delete_link(&kernel_writers, link);
    kernel_writers_changed();
}

void ram_guard_may_take(int64_t change)
{
    qatomic_add(&may_take, change);
}

const uint64_t *ram_guard_may_be_taken(void)
{
    return &may_take;
}

char *ram_guard_kernel_writers(void)
{
    g_autoptr(GString) names = g_string_new(NULL);
    GList *link;

    assert(bql_locked());
    for (link = kernel_writers.head; link; link = link->next) {
        /* a device with several queues is there several times */
        if (!strstr(names->str, link->data)) {
            g_string_append_printf(names, "%s%s", names->len ? ", " : "",
                                   (const char *)link->data);
        }
    }
    return names->len ? g_string_free(g_steal_pointer(&names), false) : NULL;
}
