/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The RAM guard: DMA counters, the discard hook, whole RAM
 *
 * Compiled with hw/dedup/ram-guard.c alone.  Everything runs on the main
 * thread with the BQL "held" (tests have a mock of it), except the counters,
 * which are what threads fight over.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"

#define CHUNK (1ULL << RAM_GUARD_CHUNK_SHIFT)

static uint8_t memory[16];
static RAMBlock *memory_block;

/* In QEMU in system/physmem.c. */
RAMBlock *qemu_ram_block_from_host(void *ptr, bool round_offset,
                                   ram_addr_t *offset)
{
    uint8_t *p = ptr;

    if (!memory_block || p < memory || p >= memory + sizeof(memory)) {
        return NULL;
    }
    *offset = p - memory;
    return memory_block;
}

static RAMBlock *block_new(ram_addr_t length)
{
    RAMBlock *rb = g_new0(RAMBlock, 1);

    rb->used_length = rb->max_length = length;
    ram_guard_block_add(rb);
    return rb;
}

static void block_free(RAMBlock *rb)
{
    ram_guard_block_free(rb);
    g_assert_null(ram_guard_dma_maps(rb, true));
    g_free(rb);
}

/* The counters of @rb, one digit each. */
static void assert_counters(RAMBlock *rb, const char *expected)
{
    const uint16_t *counters = ram_guard_dma_maps(rb, true);
    size_t i;

    for (i = 0; expected[i]; i++) {
        g_assert_cmpuint(counters[i], ==, expected[i] - '0');
    }
    g_assert_cmpuint(i, ==, DIV_ROUND_UP(rb->max_length, CHUNK));
}

static void test_dma_chunks(void)
{
    /* The last chunk is cut short: one page. */
    RAMBlock *rb = block_new(4 * CHUNK + 4096);

    assert_counters(rb, "00000");
    /* reads have counters of their own */
    ram_guard_dma_map(rb, 0, 1, false);
    g_assert_cmpuint(ram_guard_dma_maps(rb, false)[0], ==, 1);
    g_assert_cmpuint(ram_guard_dma_maps(rb, true)[0], ==, 0);
    ram_guard_dma_unmap(rb, 0, 1, false);
    g_assert_cmpuint(ram_guard_dma_maps(rb, false)[0], ==, 0);

    ram_guard_dma_map(rb, 0, 1, true);
    assert_counters(rb, "10000");
    ram_guard_dma_map(rb, CHUNK - 1, 1, true);
    assert_counters(rb, "20000");
    ram_guard_dma_map(rb, CHUNK - 1, 2, true);
    assert_counters(rb, "31000");
    ram_guard_dma_map(rb, CHUNK, 3 * CHUNK, true);
    assert_counters(rb, "32110");
    ram_guard_dma_map(rb, 4 * CHUNK, 4096, true);
    assert_counters(rb, "32111");
    ram_guard_dma_map(rb, 2 * CHUNK + 17, 0, true);
    assert_counters(rb, "32111");

    ram_guard_dma_unmap(rb, CHUNK - 1, 2, true);
    assert_counters(rb, "21111");
    ram_guard_dma_unmap(rb, 0, 1, true);
    ram_guard_dma_unmap(rb, CHUNK - 1, 1, true);
    ram_guard_dma_unmap(rb, CHUNK, 3 * CHUNK, true);
    ram_guard_dma_unmap(rb, 4 * CHUNK, 4096, true);
    assert_counters(rb, "00000");
    block_free(rb);
}

static void test_dma_uneven(void)
{
    RAMBlock *rb = block_new(4 * CHUNK);

    /* Less is unmapped than was mapped: the rest counts for ever. */
    ram_guard_dma_map(rb, 0, 3 * CHUNK, true);
    ram_guard_dma_unmap(rb, 0, CHUNK, true);
    assert_counters(rb, "0110");
    /* More is: no counter falls below zero. */
    ram_guard_dma_unmap(rb, 0, 2 * CHUNK, true);
    assert_counters(rb, "0010");
    /* Beyond the end there is nothing to count. */
    ram_guard_dma_map(rb, 3 * CHUNK, 64 * CHUNK, true);
    assert_counters(rb, "0011");
    ram_guard_dma_map(rb, 4 * CHUNK, 1, true);
    ram_guard_dma_unmap(rb, 4 * CHUNK, 1, true);
    assert_counters(rb, "0011");
    block_free(rb);
}

static void test_dma_saturated(void)
{
    RAMBlock *rb = block_new(CHUNK);
    int i;

    for (i = 0; i < UINT16_MAX - 1; i++) {
        ram_guard_dma_map(rb, 0, 1, true);
    }
    g_assert_cmpuint(ram_guard_dma_maps(rb, true)[0], ==, UINT16_MAX - 1);
    ram_guard_dma_unmap(rb, 0, 1, true);
    g_assert_cmpuint(ram_guard_dma_maps(rb, true)[0], ==, UINT16_MAX - 2);
    for (i = 0; i < 5; i++) {
        ram_guard_dma_map(rb, 0, 1, true);
    }
    g_assert_cmpuint(ram_guard_dma_maps(rb, true)[0], ==, UINT16_MAX);
    /* C22: how often it was raised since is not known: it is not lowered. */
    for (i = 0; i < 2 * UINT16_MAX; i++) {
        ram_guard_dma_unmap(rb, 0, 1, true);
    }
    g_assert_cmpuint(ram_guard_dma_maps(rb, true)[0], ==, UINT16_MAX);
    block_free(rb);
}

/* Mapped for long, but not for DMA; in RAM and elsewhere. */
static void test_exempt(void)
{
    RAMBlock *rb = block_new(2 * CHUNK);
    uint8_t elsewhere;

    memory_block = rb;
    ram_guard_dma_map(rb, 3, 8, true);
    ram_guard_dma_exempt(memory + 3, 8, true);
    assert_counters(rb, "00");
    /* Somebody else's count is not touched. */
    ram_guard_dma_map(rb, 0, 1, true);
    ram_guard_dma_unexempt(memory + 3, 8, true);
    assert_counters(rb, "20");
    ram_guard_dma_unmap(rb, 3, 8, true);
    /* Unmapped with another length than it was mapped with */
    ram_guard_dma_unexempt(memory + 3, CHUNK, true);
    ram_guard_dma_unmap(rb, 3, CHUNK, true);
    ram_guard_dma_exempt(NULL, 0, true);
    ram_guard_dma_exempt(&elsewhere, 1, true);
    ram_guard_dma_unexempt(&elsewhere, 1, true);
    assert_counters(rb, "10");
    memory_block = NULL;
    block_free(rb);
}

#define THREADS 4
#define ROUNDS 200000

static void *mapper_thread(void *opaque)
{
    RAMBlock *rb = opaque;
    g_autoptr(GRand) rand = g_rand_new();
    int i;

    for (i = 0; i < ROUNDS; i++) {
        ram_addr_t start = g_rand_int_range(rand, 0, 3 * CHUNK);
        ram_addr_t length = g_rand_int_range(rand, 1, CHUNK);

        ram_guard_dma_map(rb, start, length, true);
        g_assert_cmpuint(
            qatomic_read(&ram_guard_dma_maps(rb, true)[start / CHUNK]), !=, 0);
        ram_guard_dma_unmap(rb, start, length, true);
    }
    return NULL;
}

static void test_dma_threads(void)
{
    RAMBlock *rb = block_new(4 * CHUNK);
    QemuThread threads[THREADS];
    int i;

    for (i = 0; i < THREADS; i++) {
        qemu_thread_create(&threads[i], "mapper", mapper_thread, rb,
                           QEMU_THREAD_JOINABLE);
    }
    for (i = 0; i < THREADS; i++) {
        qemu_thread_join(&threads[i]);
    }
    assert_counters(rb, "0000");
    block_free(rb);
}

/*
 * Either the replacer sees the counter or the mapper sees the page frozen:
 * both threads write one word and read the other's, again and again.
 */
typedef struct Order {
    RAMBlock *rb;
    /* Two rendezvous per round: before it and after it. */
    unsigned arrived;
    int frozen;
    bool mapper_saw_frozen;
} Order;

static void rendezvous(Order *o, unsigned n)
{
    qatomic_inc(&o->arrived);
    while (qatomic_read(&o->arrived) < n) {
        /* A few instructions away, unless there is one CPU only. */
        sched_yield();
    }
}

static void *order_thread(void *opaque)
{
    Order *o = opaque;
    unsigned n = 0;
    int i;

    for (i = 0; i < ROUNDS; i++) {
        rendezvous(o, n += 2);
        ram_guard_dma_map(o->rb, 0, 1, true);
        o->mapper_saw_frozen = qatomic_read(&o->frozen);
        rendezvous(o, n += 2);
        ram_guard_dma_unmap(o->rb, 0, 1, true);
    }
    return NULL;
}

static void test_dma_order(void)
{
    Order o = { .rb = block_new(CHUNK) };
    unsigned n = 0, both = 0;
    QemuThread thread;
    uint16_t counter;
    int i;

    qemu_thread_create(&thread, "mapper", order_thread, &o,
                       QEMU_THREAD_JOINABLE);
    for (i = 0; i < ROUNDS; i++) {
        rendezvous(&o, n += 2);
        qatomic_set(&o.frozen, 1);
        /* Pairs with the one in ram_guard_dma_map(). */
        smp_mb();
        counter = qatomic_read(&ram_guard_dma_maps(o.rb, true)[0]);
        rendezvous(&o, n += 2);
        g_assert(counter || o.mapper_saw_frozen);
        both += counter && o.mapper_saw_frozen;
        qatomic_set(&o.frozen, 0);
    }
    qemu_thread_join(&thread);
    g_test_message("both saw each other in %u of %d rounds", both, ROUNDS);
    block_free(o.rb);
}

/* The one who replaces RAM, with a memory of what it was told. */
typedef struct Replacer {
    GString *log;
    bool refuse;
    bool needs_discards;
    RAMBlock *one;
} Replacer;

static const char *block_name(Replacer *r, RAMBlock *rb)
{
    return !rb ? "all" : rb == r->one ? "one" : "other";
}

static bool replacer_discard_begin(void *opaque, RAMBlock *rb,
                                   ram_addr_t start, size_t length)
{
    Replacer *r = opaque;

    g_string_append_printf(r->log, "discard %s %d+%d;", block_name(r, rb),
                           (int)start, (int)length);
    return !r->refuse;
}

static void replacer_discard_end(void *opaque)
{
    Replacer *r = opaque;

    g_string_append(r->log, "end;");
}

static bool replacer_begin(void *opaque, RAMBlock *rb, Error **errp)
{
    Replacer *r = opaque;

    g_assert(ram_guard_whole_busy());
    /* Nothing is to be replaced from here on. */
    g_assert(ram_guard_is_whole(rb));
    g_string_append_printf(r->log, "begin %s;", block_name(r, rb));
    if (r->refuse) {
        error_setg(errp, "5 pages do not fit");
        return false;
    }
    return true;
}

static void replacer_end(void *opaque, RAMBlock *rb)
{
    Replacer *r = opaque;

    g_string_append_printf(r->log, "end %s;", block_name(r, rb));
}

static bool replacer_prepare_remove(void *opaque, RAMBlock *rb, Error **errp)
{
    Replacer *r = opaque;

    g_assert(ram_guard_whole_busy());
    g_string_append_printf(r->log, "remove %s;", block_name(r, rb));
    if (r->refuse) {
        error_setg(errp, "5 pages do not fit");
    }
    return !r->refuse;
}

static bool replacer_needs_discards(void *opaque)
{
    return ((Replacer *)opaque)->needs_discards;
}

static const RamGuardOps replacer_ops = {
    .discard_begin = replacer_discard_begin,
    .discard_end = replacer_discard_end,
    .whole_begin = replacer_begin,
    .whole_end = replacer_end,
    .prepare_remove = replacer_prepare_remove,
    .needs_discards = replacer_needs_discards,
};

static void assert_log(Replacer *r, const char *expected)
{
    g_assert_cmpstr(r->log->str, ==, expected);
    g_string_truncate(r->log, 0);
}

/* One discard of @length bytes at @start of @rb; the log says what came. */
static bool discard(RAMBlock *rb, ram_addr_t start, size_t length)
{
    RamGuardDiscard d;
    bool ok = ram_guard_discard_begin(&d, rb, start, length);

    ram_guard_discard_end(&d);
    return ok;
}

static bool discard_host(void *host, size_t length)
{
    RamGuardDiscard d;
    bool ok = ram_guard_discard_host_begin(&d, host, length);

    ram_guard_discard_end(&d);
    return ok;
}

static void test_register(void)
{
    Replacer r = { .log = g_string_new(NULL) }, other = { 0 };

    g_assert_true(ram_guard_register(&replacer_ops, &r));
    g_assert_false(ram_guard_register(&replacer_ops, &other));
    discard(NULL, 0, 1);
    assert_log(&r, "discard all 0+1;end;");
    ram_guard_unregister();
    discard(NULL, 0, 1);
    assert_log(&r, "");
    g_assert_true(ram_guard_register(&replacer_ops, &r));
    ram_guard_unregister();
    g_string_free(r.log, true);
}

static void test_busy(void)
{
    Replacer r = { .log = g_string_new(NULL) };

    if (g_test_subprocess()) {
        ram_guard_explain_busy();
        ram_guard_register(&replacer_ops, &r);
        ram_guard_explain_busy();
        g_printerr("merging\n");
        r.needs_discards = true;
        ram_guard_explain_busy();
        exit(0);
    }
    g_assert_cmpstr(ram_guard_busy_hint(), ==, "");
    ram_guard_register(&replacer_ops, &r);
    g_assert_cmpstr(ram_guard_busy_hint(), ==, "");
    r.needs_discards = true;
    g_assert_nonnull(strstr(ram_guard_busy_hint(), "dedup-unmerge"));
    ram_guard_unregister();
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr("merging*dedup-scanner*dedup-unmerge*");
    g_string_free(r.log, true);
}

static void test_hold(void)
{
    Replacer r = { .log = g_string_new(NULL) };
    RamGuardDiscard d;

    g_assert_true(ram_guard_register(&replacer_ops, &r));
    ram_guard_hold(&d);
    assert_log(&r, "discard all 0+0;");
    ram_guard_discard_end(&d);
    assert_log(&r, "end;");
    ram_guard_unregister();
    ram_guard_hold(&d);
    ram_guard_discard_end(&d);
    assert_log(&r, "");
    g_string_free(r.log, true);
}

static void test_discard(void)
{
    Replacer r = { .log = g_string_new(NULL), .one = block_new(CHUNK) };
    RamGuardDiscard unused = { 0 };
    uint8_t elsewhere;

    memory_block = r.one;
    g_assert_true(discard(r.one, 3, 4));
    g_assert_true(discard_host(memory, 4));

    g_assert_true(ram_guard_register(&replacer_ops, &r));
    g_assert_true(discard(r.one, 3, 4));
    assert_log(&r, "discard one 3+4;end;");
    g_assert_true(discard_host(memory + 5, 6));
    assert_log(&r, "discard one 5+6;end;");
    g_assert_true(discard_host(&elsewhere, 1));
    assert_log(&r, "");
    ram_guard_discard_end(&unused);
    assert_log(&r, "");

    /* what was refused is not ended */
    r.refuse = true;
    g_assert_false(discard(r.one, 0, 1));
    g_assert_false(discard_host(memory, 1));
    assert_log(&r, "discard one 0+1;discard one 0+1;");
    g_assert_true(discard_host(&elsewhere, 1));

    ram_guard_unregister();
    memory_block = NULL;
    block_free(r.one);
    g_string_free(r.log, true);
}

static void test_whole(void)
{
    Replacer r = { .log = g_string_new(NULL), .one = block_new(CHUNK) };
    RamGuardUser *a = NULL, *b = NULL, *c = NULL;
    RAMBlock *other = block_new(CHUNK);
    char *names;

    g_assert_true(ram_guard_register(&replacer_ops, &r));
    g_assert_false(ram_guard_is_whole(NULL));
    g_assert_null(ram_guard_whole_users(NULL));

    /* One block. */
    g_assert_true(ram_guard_whole_get(&a, r.one, "nvdimm", &error_abort));
    assert_log(&r, "begin one;");
    g_assert_true(ram_guard_is_whole(r.one));
    g_assert_false(ram_guard_is_whole(other));
    g_assert_false(ram_guard_is_whole(NULL));

    /* All of them, twice by the same name: the end comes with the last. */
    g_assert_true(ram_guard_whole_get(&b, NULL, "vhost-user", &error_abort));
    g_assert_true(ram_guard_whole_get(&c, NULL, "vhost-user", &error_abort));
    assert_log(&r, "begin all;begin all;");
    g_assert_true(ram_guard_is_whole(other));
    names = ram_guard_whole_users(NULL);
    g_assert_cmpstr(names, ==, "vhost-user, vhost-user");
    g_free(names);
    names = ram_guard_whole_users(r.one);
    g_assert_cmpstr(names, ==, "nvdimm");
    g_free(names);

    ram_guard_whole_put(&b);
    g_assert_null(b);
    assert_log(&r, "");
    g_assert_true(ram_guard_is_whole(NULL));
    ram_guard_whole_put(&c);
    assert_log(&r, "end all;");
    g_assert_true(ram_guard_is_whole(r.one));
    g_assert_false(ram_guard_is_whole(other));
    ram_guard_whole_put(&a);
    /* Putting what is not held is nothing. */
    ram_guard_whole_put(&a);
    assert_log(&r, "end one;");
    g_assert_false(ram_guard_is_whole(r.one));
    g_assert_false(ram_guard_whole_busy());

    ram_guard_unregister();
    block_free(other);
    block_free(r.one);
    g_string_free(r.log, true);
}

static void test_whole_refused(void)
{
    Replacer r = { .log = g_string_new(NULL) };
    RamGuardUser *a = NULL, *b = NULL;
    Error *err = NULL;

    g_assert_true(ram_guard_register(&replacer_ops, &r));
    r.refuse = true;
    g_assert_false(ram_guard_whole_get(&a, NULL, "vhost-user 'c0'", &err));
    g_assert_cmpstr(error_get_pretty(err), ==, "vhost-user 'c0' needs guest "
                    "RAM that is not merged: 5 pages do not fit");
    error_free(err);
    g_assert_null(a);
    assert_log(&r, "begin all;end all;");
    g_assert_false(ram_guard_is_whole(NULL));
    g_assert_null(ram_guard_whole_users(NULL));

    /* Refused while somebody else holds it: that one still does. */
    r.refuse = false;
    g_assert_true(ram_guard_whole_get(&a, NULL, "first", &error_abort));
    r.refuse = true;
    g_assert_false(ram_guard_whole_get(&b, NULL, "second", NULL));
    assert_log(&r, "begin all;begin all;");
    g_assert_true(ram_guard_is_whole(NULL));
    ram_guard_whole_put(&a);
    assert_log(&r, "end all;");

    ram_guard_unregister();
    g_string_free(r.log, true);
}

/* Users who were there before the replacer are seen by it. */
static void test_whole_before(void)
{
    Replacer r = { .log = g_string_new(NULL) };
    RamGuardUser *a = NULL;

    g_assert_true(ram_guard_whole_get(&a, NULL, "early", &error_abort));
    g_assert_true(ram_guard_register(&replacer_ops, &r));
    assert_log(&r, "");
    g_assert_true(ram_guard_is_whole(NULL));
    ram_guard_whole_put(&a);
    assert_log(&r, "end all;");
    ram_guard_unregister();
    g_string_free(r.log, true);
}

static void test_remove(void)
{
    Replacer r = { .log = g_string_new(NULL), .one = block_new(CHUNK) };
    Error *err = NULL;

    g_assert_true(ram_guard_prepare_remove(r.one, &error_abort));
    g_assert_true(ram_guard_register(&replacer_ops, &r));
    g_assert_true(ram_guard_prepare_remove(r.one, &error_abort));
    r.refuse = true;
    g_assert_false(ram_guard_prepare_remove(r.one, &err));
    error_free_or_abort(&err);
    assert_log(&r, "remove one;remove one;");
    g_assert_false(ram_guard_whole_busy());
    ram_guard_unregister();
    block_free(r.one);
    g_string_free(r.log, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rust_bql_mock_lock();

    g_test_add_func("/ram-guard/dma/chunks", test_dma_chunks);
    g_test_add_func("/ram-guard/dma/uneven", test_dma_uneven);
    g_test_add_func("/ram-guard/dma/saturated", test_dma_saturated);
    g_test_add_func("/ram-guard/dma/exempt", test_exempt);
    g_test_add_func("/ram-guard/dma/threads", test_dma_threads);
    g_test_add_func("/ram-guard/dma/order", test_dma_order);
    g_test_add_func("/ram-guard/register", test_register);
    g_test_add_func("/ram-guard/discard", test_discard);
    g_test_add_func("/ram-guard/hold", test_hold);
    g_test_add_func("/ram-guard/busy", test_busy);
    g_test_add_func("/ram-guard/whole", test_whole);
    g_test_add_func("/ram-guard/whole/refused", test_whole_refused);
    g_test_add_func("/ram-guard/whole/before", test_whole_before);
    g_test_add_func("/ram-guard/remove", test_remove);
    return g_test_run();
}
