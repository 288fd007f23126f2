/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The RAM guard: who has the kernel write to RAM waits for windows, and who
 * cannot is on a list
 *
 * Compiled with hw/dedup/ram-guard.c alone, on the main thread with a mock of
 * the BQL.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"

#define CHUNK (1ULL << RAM_GUARD_CHUNK_SHIFT)

static uint8_t memory[4 * CHUNK];
static RAMBlock block = { .host = memory, .used_length = sizeof(memory),
                          .max_length = sizeof(memory) };

/* In QEMU in system/physmem.c. */
RAMBlock *qemu_ram_block_from_host(void *ptr, bool round_offset,
                                   ram_addr_t *offset)
{
    *offset = (uint8_t *)ptr - memory;
    return &block;
}

static unsigned windows;
static void *waited_host;
static size_t waited_length;
static unsigned waits;
static unsigned changes;

/* The counter is raised by now: a window that begins sees it. */
static void wait_window(void *opaque, void *host, size_t length)
{
    const uint16_t *counters = ram_guard_dma_maps(&block, true);

    g_assert_true(opaque == &windows);
    g_assert_cmpuint(counters[((uint8_t *)host - memory) / CHUNK], ==, 1);
    waited_host = host;
    waited_length = length;
    waits++;
}

static void changed(void *opaque)
{
    g_assert_true(opaque == &windows);
    changes++;
}

static const RamGuardOps ops = {
    .windows = &windows,
    .wait_window = wait_window,
    .kernel_writers_changed = changed,
};

static void test_waits(void)
{
    ram_guard_block_add(&block);
    g_assert_true(ram_guard_register(&ops, &windows));
    waits = windows = 0;

    ram_guard_dma_map(&block, 0, 1, true);
    g_assert_cmpuint(waits, ==, 0);
    ram_guard_dma_unmap(&block, 0, 1, true);

    windows = 1;
    ram_guard_dma_map(&block, CHUNK + 5, 100, true);
    g_assert_cmpuint(waits, ==, 1);
    g_assert_true(waited_host == memory + CHUNK + 5);
    g_assert_cmpuint(waited_length, ==, 100);
    ram_guard_dma_unmap(&block, CHUNK + 5, 100, true);
    /* The end of a transfer waits for nobody, and a reader neither. */
    ram_guard_dma_map(&block, 0, 1, false);
    ram_guard_dma_unmap(&block, 0, 1, false);
    g_assert_cmpuint(waits, ==, 1);

    ram_guard_unregister();
    ram_guard_dma_map(&block, 0, 1, true);
    ram_guard_dma_unmap(&block, 0, 1, true);
    g_assert_cmpuint(waits, ==, 1);
    ram_guard_block_free(&block);
}

static void assert_writers(const char *expected)
{
    g_autofree char *names = ram_guard_kernel_writers();

    g_assert_cmpstr(names, ==, expected);
}

static void test_writers(void)
{
    changes = 0;
    assert_writers(NULL);
    /* before somebody replaces RAM, and after */
    ram_guard_kernel_writer_get("vhost");
    assert_writers("vhost");
    g_assert_true(ram_guard_register(&ops, &windows));
    g_assert_cmpuint(changes, ==, 0);
    /* a queue each */
    ram_guard_kernel_writer_get("vhost");
    assert_writers("vhost");
    ram_guard_kernel_writer_get("other");
    assert_writers("vhost, other");
    g_assert_cmpuint(changes, ==, 2);
    ram_guard_kernel_writer_put("vhost");
    assert_writers("vhost, other");
    ram_guard_kernel_writer_put("vhost");
    assert_writers("other");
    ram_guard_kernel_writer_put("other");
    assert_writers(NULL);
    g_assert_cmpuint(changes, ==, 5);
    ram_guard_unregister();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rust_bql_mock_lock();
    g_test_add_func("/ram-guard/kernel/waits", test_waits);
    g_test_add_func("/ram-guard/kernel/writers", test_writers);
    return g_test_run();
}
