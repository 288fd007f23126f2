/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What must be true of RAM after a call has failed; see kth.h.
 */

#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kth.h"
#include "space/holdings.h"
#include "space/ledger.h"

/* As seen by another process: who cannot read a page has lost it. */
void kth_check_bytes(const FxRam *ram)
{
    size_t size = (size_t)ram->npages * FX_PAGE;
    g_autofree uint8_t *seen = g_malloc(size);

    for (size_t at = 0; at < size; ) {
        struct iovec to = { seen + at, size - at };
        struct iovec from = { ram->host + at, size - at };
        ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);

        if (n <= 0 && kth_poisoned()) {
            /* it said so: nobody sees other bytes */
            memcpy(seen + at, ram->shadow + at, FX_PAGE);
            n = FX_PAGE;
        }
        if (n <= 0) {
            fx_fail("lost page", "%s page %zu", fx_kind_name(ram->kind),
                    at / FX_PAGE);
        }
        at += n;
    }
    for (uint32_t i = 0; i < ram->npages; i++) {
        const uint8_t *page = seen + (size_t)i * FX_PAGE;

        if (i != KTH_HOT && memcmp(page, ram->shadow + (size_t)i * FX_PAGE,
                               FX_PAGE) != 0) {
            fx_fail(memcmp(page, page + 1, FX_PAGE - 1) == 0 && !*page ?
                    "zero page" : "foreign bytes", "%s page %u",
                    fx_kind_name(ram->kind), i);
        }
    }
}

/* The RAM's file has the contents, for whoever else opens it. */
void kth_check_file(const FxRam *ram)
{
    uint8_t page[FX_PAGE];

    for (uint32_t i = 0; i < ram->npages; i++) {
        if ((ram->kind != FX_MEMFD && ram->kind != FX_TMPFS) || i == KTH_HOT) {
            continue;
        }
        g_assert_cmpint(pread(ram->fd, page, FX_PAGE, (off_t)i * FX_PAGE), ==,
                        FX_PAGE);
        if (memcmp(page, ram->shadow + (size_t)i * FX_PAGE, FX_PAGE) != 0) {
            fx_fail("foreign bytes", "in the file of %s, page %u",
                    fx_kind_name(ram->kind), i);
        }
    }
}

/* The ledger says what is mapped. */
void kth_check_ledger(const FxRam *ram)
{
    g_autofree bool *merged = g_new(bool, ram->npages);

    fx_merged(ram, merged);
    for (uint32_t i = 0; ram->region && i < ram->npages; i++) {
        uint32_t entry = dedup_entry_at(ram->region, i);
        bool known = dedup_entry_is_segment(entry) &&
                     !dedup_entry_holding(ram->region->space, entry)->zeroes;

        if (known != merged[i]) {
            fx_fail("the ledger is wrong", "%s page %u is%s merged",
                    fx_kind_name(ram->kind), i, merged[i] ? "" : " not");
        }
    }
}
