/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The worker that restores blocks, and who waits for it with the BQL held
 *
 * Compiled with drain.c, leases.c, ram.c, whole.c and guard.c of hw/dedup/.
 * The engine is a mock: a region is a list of what removing it will come to.
 * So are the block layer and the rest of QEMU.  The main thread stands for the
 * one that has the BQL.
 */

#include "qemu/osdep.h"
#include "block/block.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "../../hw/dedup/dedup-internal.h"

#define BLOCKS 2
#define SIZE 4096

struct DedupRegion {
    int errors;                 /* so many attempts fail */
    int error;                  /* enum DedupError */
    bool until_drained;         /* as device writes do */
    bool lasts;                 /* many pages: not with the BQL held */
    unsigned attempts;
};

static DedupScanner ds;
static const RamGuardOps *guard;
static RAMBlock ram_blocks[BLOCKS];
static uint8_t memory[BLOCKS][SIZE];
static DedupRegion regions[BLOCKS];

/* The block layer */

AddressSpace address_space_memory;
static int transfers;           /* that are under way, and do not hang */
static bool hangs;
static bool drained;            /* atomic: begun, and not yet ended */
static unsigned drains;
static void (*while_draining)(void);

BlockDriverState *bdrv_next_all_states(BlockDriverState *bs)
{
    return bs ? NULL : (BlockDriverState *)memory;
}

bool bdrv_drain_poll(BlockDriverState *bs, BdrvChild *ignore_parent,
                     bool ignore_bds_parents)
{
    g_assert_true(qatomic_read(&drained));
    return hangs || transfers;
}

void bdrv_drain_all_begin_nopoll(void)
{
    g_assert_false(qatomic_read(&drained));
    drains++;
    qatomic_set(&drained, true);
    if (while_draining) {
        while_draining();
    }
}

void bdrv_drain_all_end(void)
{
    g_assert_true(qatomic_read(&drained));
    qatomic_set(&drained, false);
}

void bdrv_graph_rdlock_main_loop(void)
{
}

void bdrv_graph_rdunlock_main_loop(void)
{
}

/* The engine */

GQuark dedup_error_quark(void)
{
    return g_quark_from_static_string("mock");
}

bool dedup_region_remove(DedupRegion *region, bool keep_contents,
                         GError **error)
{
    bool is_drained = qatomic_read(&drained) && !hangs;

    region->attempts++;
    if (region->lasts) {
        g_assert_false(qatomic_read(&drained));
    }
    if (region->until_drained ? !is_drained : region->errors > 0) {
        region->errors--;
        g_set_error(error, DEDUP_ERROR, region->error, "mock");
        return false;
    }
    return true;
}

DedupRegion *dedup_region_add(DedupEngine *engine,
                              const DedupRegionInfo *info, GError **error)
{
    g_assert_not_reached();
}

void dedup_region_open(DedupRegion *region)
{
}

uint64_t dedup_region_pages_merged(DedupRegion *region)
{
    return 1;
}

void dedup_engine_cancel_restore(DedupEngine *engine, void *host)
{
}

bool dedup_engine_check_room(DedupEngine *engine,
                             DedupRegion *const *r, unsigned n,
                             GError **error)
{
    return true;
}

bool dedup_engine_discard_begin(DedupEngine *engine, void *host,
                                uint64_t size)
{
    return true;
}

void dedup_engine_discard_end(DedupEngine *engine)
{
}

void dedup_exclusive_begin(const DedupScanner *s)
{
}

void dedup_exclusive_end(void)
{
}

const unsigned *dedup_engine_windows(void)
{
    static const unsigned none;

    return &none;
}

void dedup_engine_wait_window(const void *host, size_t size)
{
}

/* The rest of QEMU */

RAMBlock *qemu_ram_block_from_host(void *ptr, bool round_offset,
                                   ram_addr_t *offset)
{
    *offset = 0;
    for (int i = 0; i < BLOCKS; i++) {
        if (ptr == memory[i]) {
            return &ram_blocks[i];
        }
    }
    return NULL;
}

void ram_block_notifier_add(RAMBlockNotifier *n)
{
    for (int i = 0; i < BLOCKS; i++) {
        n->ram_block_added(n, memory[i], SIZE, SIZE);
    }
}

void ram_block_notifier_remove(RAMBlockNotifier *n)
{
}

void memory_listener_register(MemoryListener *listener, AddressSpace *filter)
{
}

void memory_listener_unregister(MemoryListener *listener)
{
}

bool ram_guard_register(const RamGuardOps *ops, void *opaque)
{
    guard = ops;
    return true;
}

bool ram_guard_is_whole(const RAMBlock *rb)
{
    return rb == &ram_blocks[0];
}

void dedup_scanner_recheck(DedupScanner *s)
{
}

bool qemu_ram_is_shared(RAMBlock *rb)
{
    return false;
}

Object *memory_region_owner(MemoryRegion *mr)
{
    g_assert_not_reached();
}

bool dedup_block_eligible(DedupScanner *s, const DedupBlock *block,
                          DedupBlockReason *reason)
{
    g_assert_not_reached();
}

void dedup_block_info(const DedupBlock *block, DedupRegionInfo *info)
{
    g_assert_not_reached();
}

const char *dedup_block_id(const DedupBlock *block)
{
    return block->rb == &ram_blocks[0] ? "needed" : "other";
}

const char *dedup_block_reason_text(DedupBlockReason reason)
{
    return "";
}

/* The tests */

static void nothing(void *opaque)
{
}

static DedupBlock *block_of(int i)
{
    DedupBlock *block;

    QTAILQ_FOREACH(block, &ds.ram.blocks, next) {
        if (block->rb == &ram_blocks[i]) {
            return block;
        }
    }
    g_assert_not_reached();
}

/* The worker is there, and has nothing to do yet. */
static void setup(void)
{
    memset(regions, 0, sizeof(regions));
    hangs = false;
    drains = transfers = 0;
    while_draining = NULL;
    ds = (DedupScanner) { .started = true };
    QTAILQ_INIT(&ds.ram.blocks);
    qemu_mutex_init(&ds.ram.lock);
    qemu_cond_init(&ds.ram.changed);
    qemu_sem_init(&ds.ram.worker_ready, 0);
    ds.update_bh = qemu_bh_new(nothing, NULL);
    g_assert_true(dedup_ram_init(&ds, &error_abort));
    g_assert_true(dedup_guard_register(&ds));
    dedup_ram_start(&ds);
    alarm(60);
}

/* The worker is to restore it, from the next kick on. */
static void leave(int i)
{
    DedupBlock *block = block_of(i);

    qemu_mutex_lock(&ds.ram.lock);
    block->region = &regions[i];
    block->leaving = true;
    qemu_mutex_unlock(&ds.ram.lock);
}

static void teardown(void)
{
    alarm(0);
    dedup_ram_stop(&ds, false);
    dedup_ram_destroy(&ds);
    qemu_bh_delete(ds.update_bh);
    qemu_sem_destroy(&ds.ram.worker_ready);
    qemu_cond_destroy(&ds.ram.changed);
    qemu_mutex_destroy(&ds.ram.lock);
}

static bool get_whole(void)
{
    g_autoptr(Error) err = NULL;
    bool ok;

    dedup_worker_kick(&ds);
    ok = guard->whole_begin(&ds, &ram_blocks[0], &err);
    g_assert_cmpint(ok, ==, !err);
    g_assert_false(qatomic_read(&drained));
    return ok;
}

/* Pages that a device writes to: the drain lets them go. */
static void test_drain(void)
{
    setup();
    regions[0].error = DEDUP_ERROR_PINNED;
    regions[0].until_drained = true;
    leave(0);
    g_assert_true(get_whole());
    g_assert_cmpuint(drains, ==, 1);
    g_assert_cmpuint(regions[0].attempts, ==, 2);
    teardown();
}

static void transfer_ends(void *opaque)
{
    transfers--;
}

/* A transfer that ends in the main loop is waited for. */
static void test_slow(void)
{
    QEMUTimer timer;

    setup();
    regions[0].error = DEDUP_ERROR_PINNED;
    regions[0].until_drained = true;
    transfers = 1;
    aio_timer_init(qemu_get_aio_context(), &timer, QEMU_CLOCK_REALTIME,
                   SCALE_MS, transfer_ends, NULL);
    timer_mod(&timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + 200);
    leave(0);
    g_assert_true(get_whole());
    g_assert_cmpint(transfers, ==, 0);
    g_assert_cmpuint(drains, ==, 1);
    timer_del(&timer);
    teardown();
}

/* Storage that hangs: that is an error, after one drain. */
static void test_hang(void)
{
    int64_t start = g_get_monotonic_time(), ms;

    setup();
    regions[0].error = DEDUP_ERROR_PINNED;
    regions[0].until_drained = true;
    hangs = true;
    leave(0);
    g_assert_false(get_whole());
    g_assert_cmpuint(drains, ==, 1);
    ms = (g_get_monotonic_time() - start) / 1000;
    /* A timer begins to count at a whole millisecond, which may be over. */
    g_assert_cmpint(ms, >=, DEDUP_DRAIN_MS - 1);
    g_assert_cmpint(ms, <, DEDUP_DRAIN_MS + 10000);
    /* It works again, and so does the next try. */
    hangs = false;
    g_assert_true(get_whole());
    teardown();
}

/* What no drain ends may end by itself: no drain without a pause. */
static void test_in_vain(void)
{
    setup();
    regions[0].error = DEDUP_ERROR_PINNED;
    regions[0].errors = 20;
    leave(0);
    g_assert_true(get_whole());
    g_assert_cmpuint(regions[0].attempts, ==, 21);
    g_assert_cmpuint(drains, >, 0);
    g_assert_cmpuint(drains, <=, 10);
    teardown();
}

/* The other block's turn has come: the worker does not know it yet. */
static void other_is_due(void)
{
    qemu_mutex_lock(&ds.ram.lock);
    block_of(1)->retry_ms = 0;
    qemu_mutex_unlock(&ds.ram.lock);
}

/* Nobody waits for another block with the BQL held. */
static void test_other(void)
{
    DedupBlock *block;

    setup();
    /* It comes first. */
    block = block_of(1);
    qemu_mutex_lock(&ds.ram.lock);
    QTAILQ_REMOVE(&ds.ram.blocks, block, next);
    QTAILQ_INSERT_HEAD(&ds.ram.blocks, block, next);
    qemu_mutex_unlock(&ds.ram.lock);
    regions[1].error = DEDUP_ERROR_MEMORY;
    regions[1].errors = 1;
    regions[1].lasts = true;
    leave(1);
    dedup_worker_kick(&ds);
    qemu_mutex_lock(&ds.ram.lock);
    while (!block->error) {
        qemu_cond_wait(&ds.ram.changed, &ds.ram.lock);
    }
    block->retry_ms = INT64_MAX;
    qemu_mutex_unlock(&ds.ram.lock);

    while_draining = other_is_due;
    regions[0].error = DEDUP_ERROR_PINNED;
    regions[0].until_drained = true;
    leave(0);
    g_assert_true(get_whole());
    /* Then it is looked at. */
    qemu_mutex_lock(&ds.ram.lock);
    while (block->region || block->busy) {
        qemu_cond_wait(&ds.ram.changed, &ds.ram.lock);
    }
    qemu_mutex_unlock(&ds.ram.lock);
    teardown();
}

/* What failed some time ago is no answer to who removes the block now. */
static void test_remove(void)
{
    DedupBlock *block;

    setup();
    block = block_of(0);
    block->named = true;
    regions[0].error = DEDUP_ERROR_MEMORY;
    regions[0].errors = 1;
    leave(0);
    dedup_worker_kick(&ds);
    qemu_mutex_lock(&ds.ram.lock);
    while (!block->error) {
        qemu_cond_wait(&ds.ram.changed, &ds.ram.lock);
    }
    block->retry_ms = INT64_MAX;
    qemu_mutex_unlock(&ds.ram.lock);
    g_assert_true(guard->prepare_remove(&ds, &ram_blocks[0], &error_abort));
    g_assert_null(block->region);
    teardown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    rust_bql_mock_lock();

    g_test_add_func("/dedup-worker/drain", test_drain);
    g_test_add_func("/dedup-worker/slow", test_slow);
    g_test_add_func("/dedup-worker/hang", test_hang);
    g_test_add_func("/dedup-worker/in-vain", test_in_vain);
    g_test_add_func("/dedup-worker/other", test_other);
    g_test_add_func("/dedup-worker/remove", test_remove);
    return g_test_run();
}
