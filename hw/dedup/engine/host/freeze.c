/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Freezing, in whatever way; see freeze.h.
 */

#include "host/freeze-ops.h"
#include "host/mutant.h"

bool dedup_freezer_open(DedupFreezer *f, DedupFreezeHow how, int pagemap_fd,
                        GError **error)
{
    const DedupFreezeOps *ops = how == DEDUP_FREEZE_MPROTECT ?
                                &dedup_freeze_mprotect : &dedup_freeze_uffd;

    *f = (DedupFreezer) { .uffd = -1 };
    if (!ops->open(f, error)) {
        return false;
    }
    f->ops = ops;
    f->zero_anon = ops->survives_split(f, pagemap_fd);
    return true;
}

void dedup_freezer_close(DedupFreezer *f)
{
    if (f->ops) {
        f->ops->close(f);
        f->ops = NULL;
    }
}

void dedup_freezer_reopen(DedupFreezer *f)
{
    if (dedup_freezer_is_lost(f) && f->ops->open(f, NULL)) {
        __atomic_store_n(&f->lost, false, __ATOMIC_RELAXED);
    }
}

bool dedup_freezer_is_lost(const DedupFreezer *f)
{
    return __atomic_load_n(&f->lost, __ATOMIC_RELAXED);
}

bool dedup_freezer_drops(const DedupFreezer *f)
{
    return f->ops->drops;
}

bool dedup_freezer_keeps_ksm_out(const DedupFreezer *f)
{
    return f->ops->keeps_ksm_out;
}

bool dedup_freezer_fails_in_kernel(const DedupFreezer *f)
{
    return f->ops->fails_in_kernel;
}

void dedup_freeze_announce(DedupFrozen *z, DedupFreezer *f, void *addr,
                           size_t len)
{
    *z = (DedupFrozen) { .freezer = f, .addr = addr, .len = len };
    if (f->ops->announce) {
        f->ops->announce(z);
    }
}

void dedup_freeze_withdraw(DedupFrozen *z)
{
    if (z->freezer->ops->withdraw) {
        z->freezer->ops->withdraw(z);
    }
}

bool dedup_freeze_begin(DedupFrozen *z, bool missing)
{
    return DEDUP_MUTANT(NO_FREEZE) || z->freezer->ops->begin(z, missing);
}

bool dedup_freeze_readers(DedupFrozen *z, bool shared)
{
    return z->freezer->ops->drops &&
           (DEDUP_MUTANT(NO_FREEZE) || z->freezer->ops->readers(z, shared));
}

bool dedup_freeze_is_waited_for(const DedupFrozen *z)
{
    return z->freezer->ops->is_waited_for(z);
}

void dedup_freeze_unprotect(DedupFrozen *z, void *addr, size_t len)
{
    if (!DEDUP_MUTANT(NO_FREEZE) && z->freezer->ops->unprotect) {
        z->freezer->ops->unprotect(z, addr, len);
    }
}

void dedup_freeze_end(DedupFrozen *z)
{
    if (DEDUP_MUTANT(NO_FREEZE)) {
        dedup_freeze_withdraw(z);
    } else {
        z->freezer->ops->end(z);
    }
}

bool dedup_freeze_refill(DedupFrozen *z, void *addr, const void *content,
                         void *spare)
{
    g_assert(z->freezer->ops->refill);
    return z->freezer->ops->refill(z, addr, content, spare);
}
