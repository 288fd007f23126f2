/*
 * A mutant of the QEMU side: vhost-user does not say that it exports RAM
 *
 * scripts/link-mutants links this in front of ram_guard_whole_get() (the
 * linker's --wrap).  With mutant 24 on, a vhost-user device without a relay
 * lets a scanner merge RAM that its back end has mapped: what the back end
 * reads and writes is then not what the guest has.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <string.h>
#include "host/mutant.h"
#include "mutant-guard.h"

bool __wrap_ram_guard_whole_get(void **user, void *rb, const char *name,
                                void **errp)
{
    if (DEDUP_MUTANT(VHOST_USER_SILENT) &&
        !strncmp(name, "vhost-user", strlen("vhost-user"))) {
        return true;
    }
    return __real_ram_guard_whole_get(user, rb, name, errp);
}
