/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: the dedup-scanner object
 *
 * Its life:
 *
 *   made        properties are set
 *   complete    what they say was checked, the engine exists and has opened
 *               what it needs, for the user ID and the root directory may
 *               change before the VM starts.  Nothing runs: command line
 *               objects come before the machine, its memory and the
 *               accelerator.
 *   started     in the main loop, when the machine is there: RAM is watched,
 *               the scanner's thread runs
 *   finalized   the thread is stopped.  object-del is refused while a page
 *               is merged.  When QEMU exits pages are left as they are.
 *
 * Where pages cannot be kept from changing in either way (write-protect=auto
 * only) there is no engine, and the object is complete but never started.
 *
 * Everything here runs with the BQL held, but for scanner_run() and the
 * engine's callbacks, which run on the scanner's thread.
 */

#include "qemu/osdep.h"
#include "hw/dedup/ram-guard.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "qemu/timer.h"
#include "qom/object_interfaces.h"
#include "system/system.h"
#include "dedup-internal.h"
#include "trace.h"

OBJECT_DEFINE_SIMPLE_TYPE_WITH_INTERFACES(DedupScanner, dedup_scanner,
                                          DEDUP_SCANNER, OBJECT,
                                          { TYPE_USER_CREATABLE }, { NULL })

/* Where a group's NAME is looked for */
#define DEDUP_RUN_DIR "/run/qemu-dedup"
#define DEDUP_XDG_DIR "qemu-dedup"

/* How often to look at what nobody announces */
#define DEDUP_RECHECK_MS 1000

/* Looking at what forbids deduplication */

static void recheck_timer(void *opaque)
{
    DedupScanner *ds = opaque;

    dedup_scanner_recheck(ds);
    dedup_events_tell_state(ds);
    timer_mod(ds->recheck,
              qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + DEDUP_RECHECK_MS);
}

static void update_bh(void *opaque)
{
    DedupScanner *ds = opaque;

    dedup_scanner_recheck(ds);
    dedup_events_send(ds);
    dedup_events_tell_state(ds);
}

/* The scanner's thread */

static void scanner_state_changed(void *opaque, DedupState state)
{
    DedupScanner *ds = opaque;

    trace_dedup_scanner_state(dedup_state_str(state));
    qemu_bh_schedule(ds->update_bh);
}

static void *scanner_run(void *opaque)
{
    DedupScanner *ds = opaque;

    rcu_register_thread();
    qatomic_set(&ds->thread_id, qemu_get_thread_id());
    qemu_sem_post(&ds->thread_ready);
    dedup_engine_run(ds->engine);
    qatomic_set(&ds->thread_id, 0);
    rcu_unregister_thread();
    return NULL;
}

static void scanner_start(void *opaque)
{
    DedupScanner *ds = opaque;

    ds->started = true;
    if (!dedup_scanner_estimates(ds)) {
        dedup_coredump_start(ds);
    }
    dedup_migration_start(ds);
    dedup_ram_start(ds);
    dedup_scanner_recheck(ds);
    if (ds->thread_context) {
        thread_context_create_thread(ds->thread_context, &ds->thread,
                                     "dedup-scanner", scanner_run, ds,
                                     QEMU_THREAD_JOINABLE);
    } else {
        qemu_thread_create(&ds->thread, "dedup-scanner", scanner_run, ds,
                           QEMU_THREAD_JOINABLE);
    }
    qemu_sem_wait(&ds->thread_ready);
    recheck_timer(ds);
    trace_dedup_scanner_start();
}

/*
 * The bottom half runs in the main loop, when -run-with has changed the user
 * ID: members of the group look at the one that a socket was made with.
 */
static void machine_done(Notifier *n, void *data)
{
    DedupScanner *ds = container_of(n, DedupScanner, machine_done);

    qemu_bh_schedule(ds->start_bh);
}

/* Life cycle */

/*
 * Where is the group?  NULL and no error if there is none.  A directory that
 * is missing is made by the engine, if only its last part is; else the VM
 * starts without it, and says what to do (I9).  The part of
 * $XDG_RUNTIME_DIR that is for groups is the user's own, and gone after each
 * logout: it is made, too.
 */
static bool find_group(DedupScanner *ds, Error **errp)
{
    const char *xdg = g_getenv("XDG_RUNTIME_DIR");
    g_autofree char *run_dir = NULL, *xdg_dir = NULL, *xdg_parent = NULL;

    if (!ds->group || g_path_is_absolute(ds->group)) {
        ds->group_dir = g_strdup(ds->group);
        return true;
    }
    if (!*ds->group || strchr(ds->group, '/') ||
        g_str_equal(ds->group, ".") || g_str_equal(ds->group, "..")) {
        error_setg(errp, "group '%s' is neither an absolute path nor a name: "
                   "a name has no '/' and is not '.' or '..'", ds->group);
        return false;
    }
    run_dir = g_build_filename(DEDUP_RUN_DIR, ds->group, NULL);
    if (g_file_test(run_dir, G_FILE_TEST_EXISTS) || !xdg || !*xdg) {
        ds->group_dir = g_steal_pointer(&run_dir);
        return true;
    }
    xdg_parent = g_build_filename(xdg, DEDUP_XDG_DIR, NULL);
    xdg_dir = g_build_filename(xdg_parent, ds->group, NULL);
    if (g_file_test(xdg_dir, G_FILE_TEST_EXISTS) ||
        access(DEDUP_RUN_DIR, W_OK) < 0) {
        mkdir(xdg_parent, 0700);
        ds->group_dir = g_steal_pointer(&xdg_dir);
    } else {
        ds->group_dir = g_steal_pointer(&run_dir);
    }
    return true;
}

static DedupEngine *try_engine(DedupScanner *ds, DedupFreezeHow freeze,
                               GError **gerr)
{
    DedupConfig config = {
        .page_size = qemu_real_host_page_size(),
        .group_dir = ds->group_dir,
        .params = ds->params,
        .freeze = freeze,
        .beside = ram_guard_may_be_taken(),
        .callbacks = {
            .state_changed = scanner_state_changed,
            .restored = dedup_events_restored,
            .exclusive = freeze == DEDUP_FREEZE_MPROTECT ? dedup_exclusive
                                                         : NULL,
        },
        .opaque = ds,
    };

    ds->freeze = freeze;
    return dedup_engine_new(&config, gerr);
}

static bool lacks_userfaultfd(const GError *gerr)
{
    return g_error_matches(gerr, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD);
}

/* There will be nothing to start: say so now. */
static void do_without_engine(DedupScanner *ds, DedupBlockedReason reason)
{
    ds->reasons = BIT(reason);
    dedup_blockers_warn(ds);
}

/*
 * A userfaultfd, if the host grants one: then everybody waits, and nothing is
 * excluded.  Else mprotect(); what stands in its way: blockers.c.
 */
static bool make_engine(DedupScanner *ds, Error **errp)
{
    bool is_auto = ds->write_protect == DEDUP_WRITE_PROTECT_AUTO;
    g_autoptr(GError) gerr = NULL, other = NULL;

    if (!dedup_host_is_supported()) {
        do_without_engine(ds, DEDUP_BLOCKED_REASON_HOST_PAGE_SIZE);
        return true;
    }
    ds->engine = try_engine(ds, ds->write_protect ==
                            DEDUP_WRITE_PROTECT_MPROTECT ?
                            DEDUP_FREEZE_MPROTECT :
                            DEDUP_FREEZE_USERFAULTFD, &gerr);
    if (!ds->engine && is_auto && lacks_userfaultfd(gerr)) {
        ds->userfaultfd_error = g_strdup(gerr->message);
        ds->engine = try_engine(ds, DEDUP_FREEZE_MPROTECT, &other);
    }
    if (ds->engine) {
        /* Until everything was looked at that may forbid it */
        dedup_engine_block(ds->engine, true, false);
        ds->blocked = true;
        return true;
    }
    if (other) {
        do_without_engine(ds, DEDUP_BLOCKED_REASON_USERFAULTFD);
        return true;
    }
    error_setg(errp, "%s%s", lacks_userfaultfd(gerr) ?
               "write-protect=userfaultfd is not possible: " : "",
               gerr->message);
    return false;
}

static void dedup_scanner_complete(UserCreatable *uc, Error **errp)
{
    ERRP_GUARD();
    DedupScanner *ds = DEDUP_SCANNER(uc), *other = dedup_scanner_get();

    if (other) {
        error_setg(errp, "only one dedup-scanner is possible per virtual "
                   "machine, and '%s' exists",
                   object_get_canonical_path_component(OBJECT(other)));
        return;
    }
    if (!dedup_scanner_check_mode(&ds->params, errp) ||
        !find_group(ds, errp) || !make_engine(ds, errp)) {
        return;
    }
    ds->overcommit_fd = open("/proc/sys/vm/overcommit_memory",
                             O_RDONLY | O_CLOEXEC);
    dedup_coredump_init(ds);
    if (ds->engine) {
        if (!dedup_ram_init(ds, errp)) {
            return;
        }
        if (!dedup_guard_register(ds)) {
            error_setg(errp, "something else replaces guest RAM already");
            return;
        }
        ds->update_bh = qemu_bh_new(update_bh, ds);
        ds->start_bh = qemu_bh_new(scanner_start, ds);
        ds->recheck = timer_new_ms(QEMU_CLOCK_REALTIME, recheck_timer, ds);
        ds->machine_done.notify = machine_done;
        qemu_add_machine_init_done_notifier(&ds->machine_done);
    }
    ds->completed = true;
    dedup_scanner_set(ds);
    if (!ds->engine) {
        /* Nothing starts that would. */
        dedup_events_tell_state(ds);
    }
}

static bool dedup_scanner_prepare_delete(UserCreatable *uc, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(uc);
    const char *id = object_get_canonical_path_component(OBJECT(ds));

    if (!ds->started) {
        return true;
    }
    if (ram_guard_whole_busy()) {
        error_setg(errp, "dedup-scanner '%s' is restoring memory for "
                   "somebody else; try again later", id);
        return false;
    }
    /* Nothing may be merged between the look and the end. */
    dedup_engine_block(ds->engine, true, ds->hard);
    if (dedup_engine_is_whole(ds->engine)) {
        /* An unmerge has ended by that, whether it was said or not. */
        dedup_events_end_unmerge(ds);
        return true;
    }
    dedup_engine_block(ds->engine, ds->blocked, ds->hard);
    error_setg(errp, "pages are merged by dedup-scanner '%s'; run "
               "dedup-unmerge first", id);
    return false;
}

static void scanner_stop(DedupScanner *ds)
{
    bool whole;

    timer_del(ds->recheck);
    dedup_migration_stop(ds);
    dedup_engine_stop(ds->engine);
    qemu_thread_join(&ds->thread);
    whole = dedup_engine_is_whole(ds->engine);
    trace_dedup_scanner_stop(whole);
    dedup_ram_stop(ds, whole);
    if (whole) {
        dedup_coredump_stop(ds);
    }
    if (ds->discard_required) {
        ram_block_discard_require(false);
    }
}

static void dedup_scanner_init(Object *obj)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);

    ds->params = (DedupParams) {
        .mode = DEDUP_MODE_FULL,
        .run = true,
        .pages_to_scan = DEDUP_DEFAULT_PAGES_TO_SCAN,
        .sleep_millisecs = DEDUP_DEFAULT_SLEEP_MILLISECS,
        .zero_pages = true,
        .huge_pages_split = true,
        .max_maps = DEDUP_DEFAULT_MAX_MAPS,
        .advisor = DEDUP_ADVISOR_SCAN_TIME,
        .target_scan_s = DEDUP_DEFAULT_TARGET_SCAN_TIME,
        .max_cpu = DEDUP_DEFAULT_MAX_CPU,
        .max_pages = DEDUP_DEFAULT_MAX_PAGES,
    };
    ds->has_advisor = false;
    ds->overcommit_fd = -1;
    ds->coredump_fd = -1;
    ds->ram.kick_fd = -1;
    ds->ram.signal_fd = -1;
    QTAILQ_INIT(&ds->ram.blocks);
    qemu_mutex_init(&ds->ram.lock);
    qemu_cond_init(&ds->ram.changed);
    qemu_sem_init(&ds->ram.worker_ready, 0);
    qemu_sem_init(&ds->thread_ready, 0);
    dedup_events_init(ds);
}

static void dedup_scanner_finalize(Object *obj)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);

    if (ds->started) {
        scanner_stop(ds);
    }
    if (ds->completed && ds->engine) {
        qemu_remove_machine_init_done_notifier(&ds->machine_done);
        ram_guard_unregister();
    }
    if (dedup_scanner_get() == ds) {
        dedup_scanner_set(NULL);
    }
    g_clear_pointer(&ds->recheck, timer_free);
    g_clear_pointer(&ds->start_bh, qemu_bh_delete);
    g_clear_pointer(&ds->update_bh, qemu_bh_delete);
    g_clear_pointer(&ds->engine, dedup_engine_free);
    dedup_ram_destroy(ds);
    dedup_coredump_destroy(ds);
    if (ds->overcommit_fd >= 0) {
        close(ds->overcommit_fd);
    }
    dedup_events_destroy(ds);
    qemu_sem_destroy(&ds->thread_ready);
    qemu_sem_destroy(&ds->ram.worker_ready);
    qemu_cond_destroy(&ds->ram.changed);
    qemu_mutex_destroy(&ds->ram.lock);
    g_free(ds->userfaultfd_error);
    g_free(ds->group_dir);
    g_free(ds->group);
}

static void dedup_scanner_class_init(ObjectClass *oc, QemuClassData *data)
{
    UserCreatableClass *ucc = USER_CREATABLE_CLASS(oc);

    ucc->complete = dedup_scanner_complete;
    ucc->prepare_delete = dedup_scanner_prepare_delete;
    dedup_scanner_add_properties(oc);
}
