/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: what migration and snapshots forbid, and when
 *
 *   precopy            Merging changes no contents: it goes on until the VM
 *                      stops in order to leave.
 *   zero-copy send,    The kernel or the disk reads pages whenever it likes,
 *   direct I/O         uncounted, so none is replaced meanwhile (see
 *                      ram-guard.c).
 *   left               From then on nothing is merged until this VM runs
 *                      again, be it that migration failed or that somebody
 *                      continues it: its RAM's file may be mapped by the
 *                      running destination.
 *   incoming           Nothing is merged before the VM runs here.  Postcopy
 *                      lets it run while the kernel still reports missing
 *                      pages to another userfaultfd: nothing is remapped
 *                      (hard) until the last page has come.  No event tells
 *                      when that is; the recheck timer finds it.
 *   ignored blocks     x-ignore-shared and cpr: the destination maps the
 *                      RAM's file instead of receiving pages.  Blocks are
 *                      restored before the migration starts, or it fails.
 *   background         Its userfaultfd must be the only one, and a mapping
 *   snapshot           that is replaced loses its protection: nothing is
 *                      remapped (hard) from before it starts until it ends.
 *
 * MIG_EVENT_PRECOPY_SETUP comes on the main thread before the migration
 * thread exists, so that what is said there stands in time.  All events come
 * with the BQL held.
 */

#include "qemu/osdep.h"
#include "exec/cpu-common.h"
#include "hw/dedup/qemu-compat.h"
#include "migration/misc.h"
#include "migration/options.h"
#include "qapi/error.h"
#include "system/runstate.h"
#include "dedup-internal.h"
#include "trace.h"

/* Does the kernel send pages from where they are? */
static bool reads_uncounted(void)
{
    return migrate_zero_copy_send() || migrate_direct_io();
}

static int mig_event(NotifierWithReturn *n, MigrationEvent *e, Error **errp)
{
    DedupScanner *ds = dedup_scanner_get();
    DedupMigration *m = &ds->migration;
    bool ok = true;

    trace_dedup_migration_event(e->type, runstate_get());
    switch (e->type) {
    case MIG_EVENT_PRECOPY_SETUP:
        m->uncounted = reads_uncounted();
        if (migrate_background_snapshot()) {
            m->snapshot = true;
            dedup_scanner_recheck(ds);
        } else {
            /* Blocks that are ignored are not eligible any more: ram.c. */
            ok = dedup_whole_check_room(ds, migrate_ram_is_ignored, errp);
            if (ok) {
                m->whole = true;
                dedup_scanner_recheck(ds);
                ok = dedup_whole_wait(ds, migrate_ram_is_ignored, errp);
            }
            m->whole = ok;
        }
        break;
    case MIG_EVENT_PRECOPY_DONE:
        m->uncounted = false;
        if (m->snapshot) {
            m->snapshot = false;
        } else {
            m->left = !runstate_is_running();
            m->whole = m->whole && m->left;
        }
        break;
    case MIG_EVENT_PRECOPY_FAILED:
        m->uncounted = false;
        m->snapshot = false;
        m->whole = false;
        m->left = false;
        break;
    default:
        g_assert_not_reached();
    }
    if (e->type != MIG_EVENT_PRECOPY_SETUP || !ok) {
        dedup_scanner_recheck(ds);
    }
    return ok ? 0 : -ENOMEM;
}

static void vm_state_changed(void *opaque, bool running, RunState state)
{
    DedupScanner *ds = opaque;
    DedupMigration *m = &ds->migration;

    if (running) {
        m->left = false;
        /* A migration under way, or already done, says this for itself. */
        m->whole = m->whole && migration_is_running();
    } else if (state == RUN_STATE_FINISH_MIGRATE) {
        m->left = true;
    }
    /* and KVM may begin to write, or has stopped: blockers.c */
    dedup_scanner_recheck(ds);
}

void dedup_migration_start(DedupScanner *ds)
{
    DedupMigration *m = &ds->migration;
    MigMode mode;

    /* We may come when it is under way. */
    m->snapshot = migration_in_bg_snapshot();
    m->whole = !m->snapshot && migration_is_running();
    m->uncounted = m->whole && reads_uncounted();
    for (mode = 0; mode < MIG_MODE__MAX; mode++) {
        migration_add_notifier_mode(&m->notifier[mode], mig_event, mode);
    }
    m->vm_state = qemu_add_vm_change_state_handler(vm_state_changed, ds);
}

void dedup_migration_stop(DedupScanner *ds)
{
    DedupMigration *m = &ds->migration;
    MigMode mode;

    for (mode = 0; mode < MIG_MODE__MAX; mode++) {
        migration_remove_notifier(&m->notifier[mode]);
    }
    g_clear_pointer(&m->vm_state, qemu_del_vm_change_state_handler);
}
