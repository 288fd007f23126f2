/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The two ways to freeze, for freeze.c; what each call does: freeze.h.
 */

#ifndef DEDUP_FREEZE_OPS_H
#define DEDUP_FREEZE_OPS_H

#include "host/freeze.h"

/* What is NULL does nothing, and says false. */
struct DedupFreezeOps {
    bool drops;
    bool keeps_ksm_out;
    bool fails_in_kernel;
    bool (*open)(DedupFreezer *f, GError **error);
    void (*close)(DedupFreezer *f);
    bool (*survives_split)(DedupFreezer *f, int pagemap_fd);
    void (*announce)(DedupFrozen *z);
    void (*withdraw)(DedupFrozen *z);
    bool (*begin)(DedupFrozen *z, bool missing);
    bool (*readers)(DedupFrozen *z, bool shared);
    bool (*is_waited_for)(const DedupFrozen *z);
    void (*unprotect)(DedupFrozen *z, void *addr, size_t len);
    void (*end)(DedupFrozen *z);
    bool (*refill)(DedupFrozen *z, void *addr, const void *content,
                   void *spare);
};

/*
 * Is the protection of a page of zeros still there when the huge page that it
 * is part of was split?  Tries it out; false also without a huge page for it.
 */
bool dedup_uffd_probe_split(int uffd, int pagemap_fd);

extern const DedupFreezeOps dedup_freeze_uffd;
extern const DedupFreezeOps dedup_freeze_mprotect;

#endif /* DEDUP_FREEZE_OPS_H */
