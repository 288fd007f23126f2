/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: what forbids it for the whole VM
 *
 * Each reason is looked up afresh whenever somebody asks; nothing but
 * migration keeps state.  While there is a reason nothing is merged, and what
 * is merged stays: none of them is about merged pages, only about merging
 * (whoever cannot stand merged pages has the blocks restored, ram.c).  The VM
 * always starts (I9).
 */

#include "qemu/osdep.h"
#include <sys/prctl.h>
#include "exec/cpu-common.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/boards.h"
#include "hw/core/cpu.h"
#include "hw/dedup/ram-guard.h"
#include "hw/xen/xen.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "system/kvm.h"
#include "system/system.h"
#include "dedup-internal.h"

/* Linux 6.4 */
#ifndef PR_GET_MEMORY_MERGE
#define PR_GET_MEMORY_MERGE 68
#endif

static bool memory_is_locked(void)
{
    return should_mlock(mlock_state) && !is_mlock_on_fault(mlock_state);
}

/*
 * Each new mapping is KSM's as well, those that a window makes included: KSM
 * would merge what we map, and we would take it from KSM again and again.
 */
static bool memory_is_ksm(void)
{
    return prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) > 0;
}

/* vm.overcommit_memory=2: every private mapping counts in full. */
static bool overcommit_is_strict(DedupScanner *ds)
{
    char c;

    return ds->overcommit_fd >= 0 &&
           pread(ds->overcommit_fd, &c, 1, 0) == 1 && c == '2';
}

static int block_has_guest_memfd(RAMBlock *rb, void *opaque)
{
    return rb->guest_memfd >= 0;
}

static bool guest_is_confidential(void)
{
    return current_machine->cgs ||
           qemu_ram_foreach_block(block_has_guest_memfd, NULL);
}

/*
 * KVM pins pages of a guest that runs guests of its own (its VMCS or VMCB
 * and what they point to), and no fault tells when it writes there.
 */
static bool guest_is_hypervisor(void)
{
    static const char *const features[] = { "vmx", "svm" };
    Object *cpu = OBJECT(first_cpu);
    int i;

    if (!kvm_enabled() || !cpu) {
        return false;
    }
    for (i = 0; i < ARRAY_SIZE(features); i++) {
        if (object_property_find(cpu, features[i]) &&
            object_property_get_bool(cpu, features[i], &error_abort)) {
            return true;
        }
    }
    return false;
}

bool dedup_host_is_supported(void)
{
#ifdef HOST_X86_64
    return qemu_real_host_page_size() == 4096;
#else
    return false;
#endif
}

/*
 * Threads of vhost write to a guest's RAM by themselves, and so does KVM for a
 * guest of Xen.  With mprotect() that would fail; with a userfaultfd they wait.
 * Who, to be freed, or NULL.
 */
static char *kernel_writers(void)
{
    return xen_mode == XEN_EMULATE ? g_strdup("a Xen guest")
                                   : ram_guard_kernel_writers();
}

static bool needs_userfaultfd(DedupScanner *ds)
{
    g_autofree char *writers = kernel_writers();

    return ds->freeze == DEDUP_FREEZE_MPROTECT && writers;
}

/*
 * vCPUs of KVM are kept out of the guest while a page is replaced.  Where the
 * host takes long for that, nothing is merged while they run, unless the user
 * has chosen it.
 */
static bool holds_vcpus_long(DedupScanner *ds)
{
    return ds->freeze == DEDUP_FREEZE_MPROTECT &&
           ds->write_protect == DEDUP_WRITE_PROTECT_AUTO && ds->engine &&
           dedup_engine_holds_long(ds->engine) && kvm_enabled() &&
           runstate_is_running();
}

/* Why, and until when: migration.c. */
static bool migration_blocks(DedupScanner *ds)
{
    return ds->migration.left || ds->migration.uncounted ||
           migration_in_incoming_postcopy() ||
           runstate_check(RUN_STATE_INMIGRATE) ||
           runstate_check(RUN_STATE_RESTORE_VM) ||
           runstate_check(RUN_STATE_FINISH_MIGRATE) ||
           runstate_check(RUN_STATE_POSTMIGRATE) ||
           runstate_check(RUN_STATE_COLO);
}

/* Reading does no harm where replacing would: these matter all the same. */
static const uint32_t estimate_blockers =
    BIT(DEDUP_BLOCKED_REASON_HOST_PAGE_SIZE) |
    BIT(DEDUP_BLOCKED_REASON_MEM_MERGE_OFF) |
    BIT(DEDUP_BLOCKED_REASON_CONFIDENTIAL) |
    BIT(DEDUP_BLOCKED_REASON_MIGRATION) |
    BIT(DEDUP_BLOCKED_REASON_PAGEMAP) |
    BIT(DEDUP_BLOCKED_REASON_GROUP);

uint32_t dedup_blockers(DedupScanner *ds)
{
    uint32_t r = 0;
    g_autofree char *group_error = NULL;

    if (!dedup_host_is_supported()) {
        r |= BIT(DEDUP_BLOCKED_REASON_HOST_PAGE_SIZE);
    } else if (!ds->engine || dedup_engine_lost_userfaultfd(ds->engine) ||
        needs_userfaultfd(ds) || holds_vcpus_long(ds)) {
        r |= BIT(DEDUP_BLOCKED_REASON_USERFAULTFD);
    }
    if (!current_machine->mem_merge) {
        r |= BIT(DEDUP_BLOCKED_REASON_MEM_MERGE_OFF);
    }
    if (memory_is_locked()) {
        r |= BIT(DEDUP_BLOCKED_REASON_MEM_LOCK);
    }
    if (memory_is_ksm()) {
        r |= BIT(DEDUP_BLOCKED_REASON_MEMORY_KSM);
    }
    if (overcommit_is_strict(ds)) {
        r |= BIT(DEDUP_BLOCKED_REASON_OVERCOMMIT);
    }
    if (guest_is_confidential()) {
        r |= BIT(DEDUP_BLOCKED_REASON_CONFIDENTIAL);
    }
    if (guest_is_hypervisor()) {
        r |= BIT(DEDUP_BLOCKED_REASON_NESTED_VIRTUALIZATION);
    }
    if (kvm_enabled() && !kvm_has_sync_mmu()) {
        r |= BIT(DEDUP_BLOCKED_REASON_KVM_SYNC_MMU);
    }
    if (ram_guard_is_whole(NULL)) {
        r |= BIT(DEDUP_BLOCKED_REASON_RAM_EXPORTED);
    }
    if (ds->migration.snapshot) {
        r |= BIT(DEDUP_BLOCKED_REASON_BACKGROUND_SNAPSHOT);
    } else if (migration_blocks(ds)) {
        r |= BIT(DEDUP_BLOCKED_REASON_MIGRATION);
    }
    if (ds->engine && !dedup_engine_has_pagemap(ds->engine)) {
        r |= BIT(DEDUP_BLOCKED_REASON_PAGEMAP);
    }
    group_error = ds->engine ? dedup_engine_group_error(ds->engine) : NULL;
    if (group_error) {
        r |= BIT(DEDUP_BLOCKED_REASON_GROUP);
    }
    return dedup_scanner_estimates(ds) ? r & estimate_blockers : r;
}

bool dedup_blockers_hard(DedupScanner *ds)
{
    /*
     * Others have registered a userfaultfd with the RAM: a new mapping
     * would lose the write protection of a snapshot, or the pages that
     * postcopy still waits for.  Or a thread of the kernel would fail to
     * write to what is frozen, be it to merge or to restore.
     */
    return ds->migration.snapshot || migration_in_incoming_postcopy() ||
           needs_userfaultfd(ds);
}

/* The engine says what to do, unless it was the host that said no. */
static char *group_detail(DedupScanner *ds)
{
    g_autofree char *text = dedup_engine_group_error(ds->engine);
    bool denied;

    if (!text) {
        return g_strdup(ds->group_dir);
    }
    denied = strstr(text, g_strerror(EACCES)) ||
             strstr(text, g_strerror(EPERM));
    return g_strdup_printf("%s%s", text,
                           denied ? "; give that user the right to use it; a "
                           "security module may deny it, too" : "");
}

static char *userfaultfd_detail(DedupScanner *ds)
{
    const char *grant = ds->userfaultfd_error ? ds->userfaultfd_error :
        "give QEMU access to /dev/userfaultfd or CAP_SYS_PTRACE, or set the "
        "sysctl vm.unprivileged_userfaultfd to 1";
    g_autofree char *writers = kernel_writers();

    if (ds->engine && ds->freeze == DEDUP_FREEZE_USERFAULTFD) {
        return g_strdup_printf("the userfaultfd was lost, and no other is "
                               "granted: %s", grant);
    }
    if (ds->engine && !ds->userfaultfd_error) {
        return g_strdup_printf("write-protect=mprotect cannot serve %s: use "
                               "write-protect=auto, and %s", writers, grant);
    }
    if (ds->engine && writers) {
        return g_strdup_printf("without one nothing is merged beside %s. %s",
                               writers, grant);
    }
    if (ds->engine) {
        return g_strdup_printf("without one vCPUs are stopped to merge pages, "
                               "which takes longer than 200 us on this host: "
                               "set write-protect=mprotect if they may be, or "
                               "pause the VM. %s", grant);
    }
    return g_strdup(grant);
}

/* What to change.  To be freed. */
static char *blocked_detail(DedupScanner *ds, DedupBlockedReason reason)
{
    g_autofree char *text = NULL;

    switch (reason) {
    case DEDUP_BLOCKED_REASON_USERFAULTFD:
        return userfaultfd_detail(ds);
    case DEDUP_BLOCKED_REASON_GROUP:
        return group_detail(ds);
    case DEDUP_BLOCKED_REASON_HOST_PAGE_SIZE:
        return g_strdup("only x86-64 hosts with pages of 4 KiB can be "
                        "served");
    case DEDUP_BLOCKED_REASON_MEM_MERGE_OFF:
        return g_strdup("start QEMU with -machine mem-merge=on (libvirt: "
                        "take <nosharepages/> out of <memoryBacking>)");
    case DEDUP_BLOCKED_REASON_MEM_LOCK:
        return g_strdup("start QEMU with -overcommit mem-lock=on-fault or "
                        "off (libvirt: take <locked/> out of "
                        "<memoryBacking>)");
    case DEDUP_BLOCKED_REASON_MEMORY_KSM:
        return g_strdup("start QEMU without prctl(PR_SET_MEMORY_MERGE): set "
                        "MemoryKSM=no in the systemd unit that starts it");
    case DEDUP_BLOCKED_REASON_OVERCOMMIT:
        return g_strdup("set the sysctl vm.overcommit_memory to 0 or 1");
    case DEDUP_BLOCKED_REASON_CONFIDENTIAL:
        return g_strdup("memory of a confidential guest cannot be compared");
    case DEDUP_BLOCKED_REASON_NESTED_VIRTUALIZATION:
        return g_strdup("hide nested virtualization from the guest: "
                        "-cpu ...,vmx=off,svm=off");
    case DEDUP_BLOCKED_REASON_KVM_SYNC_MMU:
        return g_strdup("use a kernel whose KVM follows changes of memory "
                        "mappings");
    case DEDUP_BLOCKED_REASON_DISCARD_DISABLED:
        return g_strdup("remove the device or feature that pins memory "
                        "(VFIO, vDPA, an NVMe block driver and the like)");
    case DEDUP_BLOCKED_REASON_RAM_EXPORTED:
        text = ram_guard_whole_users(NULL);
        return g_strdup_printf("remove what needs all memory in its place "
                               "(or, if it is a vhost-user device, give it "
                               "relay=on): %s", text ? text : "a device");
    case DEDUP_BLOCKED_REASON_MIGRATION:
        return g_strdup("wait until the migration has ended and the virtual "
                        "machine runs here");
    case DEDUP_BLOCKED_REASON_BACKGROUND_SNAPSHOT:
        return g_strdup("wait until the background snapshot has ended");
    case DEDUP_BLOCKED_REASON_NO_ELIGIBLE_MEMORY:
        return dedup_ram_why_none(ds);
    case DEDUP_BLOCKED_REASON_PAGEMAP:
        return g_strdup("/proc/self/pagemap cannot be opened: give QEMU a "
                        "/proc when it starts; a security module may deny "
                        "it, too");
    case DEDUP_BLOCKED_REASON_MAX_MAPS:
        return g_strdup("raise the sysctl vm.max_map_count or the property "
                        "max-maps");
    case DEDUP_BLOCKED_REASON_MEMORY:
        return g_strdup("give the memory cgroup more room: pages that are "
                        "merged need it if they are written");
    case DEDUP_BLOCKED_REASON_FILE_DESCRIPTORS:
        return g_strdup("raise the limit of open files (RLIMIT_NOFILE)");
    case DEDUP_BLOCKED_REASON_FILE_SYSTEM_FULL:
        return g_strdup("make room on the tmpfs of the RAM's file, or enlarge "
                        "it (mount -o remount,size=...): it could not take "
                        "back what is merged");
    case DEDUP_BLOCKED_REASON_INDEX_FULL:
        return g_strdup("split the group: its index is full");
    case DEDUP_BLOCKED_REASON__MAX:
        break;
    }
    g_assert_not_reached();
}

static uint32_t limits_to_reasons(unsigned limits)
{
    static const struct {
        DedupLimit limit;
        DedupBlockedReason reason;
    } map[] = {
        { DEDUP_LIMIT_MAPS, DEDUP_BLOCKED_REASON_MAX_MAPS },
        { DEDUP_LIMIT_MEMORY, DEDUP_BLOCKED_REASON_MEMORY },
        { DEDUP_LIMIT_FDS, DEDUP_BLOCKED_REASON_FILE_DESCRIPTORS },
        { DEDUP_LIMIT_INDEX, DEDUP_BLOCKED_REASON_INDEX_FULL },
        { DEDUP_LIMIT_FILE, DEDUP_BLOCKED_REASON_FILE_SYSTEM_FULL },
    };
    uint32_t r = 0;
    int i;

    for (i = 0; i < ARRAY_SIZE(map); i++) {
        if (limits & map[i].limit) {
            r |= BIT(map[i].reason);
        }
    }
    return r;
}

/*
 * One warning for each reason that does not pass by itself, for people who
 * look into a log: libvirt keeps what QEMU says on stderr.  Limits are not
 * among them: they come and go.  A reason that was gone, as that of a device
 * whose plug has failed, is news when it is back.
 */
void dedup_blockers_warn(DedupScanner *ds)
{
    const uint32_t passing = BIT(DEDUP_BLOCKED_REASON_MIGRATION) |
                             BIT(DEDUP_BLOCKED_REASON_BACKGROUND_SNAPSHOT);
    uint32_t news = ds->reasons & ~ds->warned & ~passing;
    DedupBlockedReason reason;

    if ((ds->reasons & passing) || ds->migration.whole) {
        return; /* the others are looked at when it runs here */
    }
    ds->warned = (ds->warned & ds->reasons) | news;
    for (reason = 0; reason < DEDUP_BLOCKED_REASON__MAX; reason++) {
        if (news & BIT(reason)) {
            g_autofree char *detail = blocked_detail(ds, reason);

            warn_report("dedup-scanner is blocked (%s): %s",
                        DedupBlockedReason_str(reason), detail);
        }
    }
}

DedupBlockedList *dedup_blockers_list(DedupScanner *ds,
                                      const DedupStats *stats)
{
    DedupBlockedList *list = NULL, **tail = &list;
    uint32_t reasons = ds->reasons;
    DedupBlockedReason reason;

    if (stats->state == DEDUP_STATE_LIMITED) {
        reasons |= limits_to_reasons(stats->limits);
    }
    for (reason = 0; reason < DEDUP_BLOCKED_REASON__MAX; reason++) {
        if (reasons & BIT(reason)) {
            DedupBlocked *blocked = g_new0(DedupBlocked, 1);

            blocked->reason = reason;
            blocked->detail = blocked_detail(ds, reason);
            QAPI_LIST_APPEND(tail, blocked);
        }
    }
    return list;
}
