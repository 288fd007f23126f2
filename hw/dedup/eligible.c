/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: which RAM block is eligible, and why not
 *
 * A block is eligible if QEMU's page tables are the only way to its memory,
 * or at least the only one that we are not told about, and if replacing a
 * page of it by a private mapping changes nothing that somebody asked for.
 *
 * Asked again and again, not once: a memory backend sets most of its
 * attributes after ram_block_added was called, a device takes it later, and
 * some properties may change at any time.  With the BQL held.
 */

#include "qemu/osdep.h"
#include <sys/vfs.h>
#include <linux/magic.h>
#include "exec/cpu-common.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/boards.h"
#include "hw/dedup/ram-guard.h"
#include "hw/mem/pc-dimm.h"
#include "system/hostmem.h"
#include "system/qtest.h"
#include "dedup-internal.h"

const char *dedup_block_id(const DedupBlock *block)
{
    const char *id = qemu_ram_get_idstr(block->rb);

    /* Blocks without a migration name: the name that their maker gave. */
    return *id ? id : memory_region_name(block->rb->mr);
}

const char *dedup_block_reason_text(DedupBlockReason reason)
{
    switch (reason) {
    case DEDUP_BLOCK_REASON_NOT_BACKEND:
        return "not RAM but video memory, firmware or the like; nothing to "
               "change";
    case DEDUP_BLOCK_REASON_DEVICE_MEMORY:
        return "memory that a device brought along; nothing to change";
    case DEDUP_BLOCK_REASON_RESIZEABLE:
        return "its size varies; nothing to change";
    case DEDUP_BLOCK_REASON_READ_ONLY:
        return "the guest cannot write it, or its file was opened for "
               "reading only: set readonly=off for this memory backend";
    case DEDUP_BLOCK_REASON_NOT_MAPPED:
        return "no device uses it yet; add a pc-dimm";
    case DEDUP_BLOCK_REASON_DEVICE_BACKEND:
        return "its device may share it or take it away; use a pc-dimm";
    case DEDUP_BLOCK_REASON_MERGE_OFF:
        return "set merge=on for this memory backend";
    case DEDUP_BLOCK_REASON_PREALLOC:
        return "set prealloc=off for this memory backend";
    case DEDUP_BLOCK_REASON_HOST_NODES:
        return "leave host-nodes and policy unset for this memory backend";
    case DEDUP_BLOCK_REASON_HUGE_PAGES:
        return "do not use hugetlbfs; transparent huge pages are fine";
    case DEDUP_BLOCK_REASON_PMEM:
        return "persistent memory; use another memory backend";
    case DEDUP_BLOCK_REASON_NOT_TMPFS:
        return "its file is not on a tmpfs: set mem-path to one (libvirt: "
               "memory_backing_dir in qemu.conf), or use memfd (libvirt: "
               "<source type='memfd'/> in <memoryBacking>)";
    case DEDUP_BLOCK_REASON_OPENED_ELSEWHERE:
        return "another process has opened its file; let it stop, or use "
               "memfd";
    case DEDUP_BLOCK_REASON_LEASE_DENIED:
        return "QEMU must own the file to notice who opens it; change its "
               "owner, or use memfd";
    case DEDUP_BLOCK_REASON_EXPORTED:
        return "another process or device must find all of it in its place: "
               "remove what ram-exported names, or wait until the VM runs "
               "here again";
    case DEDUP_BLOCK_REASON_OUT_OF_MEMORY:
        return "no memory to keep track of it; free some, or raise the limit "
               "of address space (RLIMIT_AS)";
    case DEDUP_BLOCK_REASON__MAX:
        break;
    }
    g_assert_not_reached();
}

static bool block_is_shared(const DedupBlock *block)
{
    return qemu_ram_is_shared(block->rb);
}

/* memfd and shm_open() are tmpfs, too. */
static bool block_is_tmpfs(const DedupBlock *block)
{
    struct statfs sfs;

    return fstatfs(block->rb->fd, &sfs) == 0 && sfs.f_type == TMPFS_MAGIC;
}

static int is_dimm_of(Object *obj, void *opaque)
{
    HostMemoryBackend *backend = opaque;

    /* Not a subclass: nvdimm is one. */
    return g_str_equal(object_get_typename(obj), TYPE_PC_DIMM) &&
           PC_DIMM(obj)->hostmem == backend;
}

/*
 * Is the backend used as ordinary RAM?  Whatever is not known to do so may
 * map it elsewhere (ivshmem, virtio-pmem), keep it beyond the VM's life
 * (nvdimm) or discard it without saying so (virtio-mem).
 */
static bool backend_is_ram(HostMemoryBackend *backend)
{
    /* Where devices are that somebody added; a DIMM is never elsewhere. */
    static const char *const containers[] = { "peripheral", "peripheral-anon" };
    MachineState *ms = current_machine;
    int i;

    if (ms->memdev == backend) {
        return true;
    }
    if (ms->numa_state) {
        for (i = 0; i < ms->numa_state->num_nodes; i++) {
            if (ms->numa_state->nodes[i].node_memdev == backend) {
                return true;
            }
        }
    }
    for (i = 0; i < ARRAY_SIZE(containers); i++) {
        if (object_child_foreach(machine_get_container(containers[i]),
                                 is_dimm_of, backend)) {
            return true;
        }
    }
    return false;
}

static bool migration_keeps_whole(DedupScanner *ds, const DedupBlock *block)
{
    return ds->migration.whole && migrate_ram_is_ignored(block->rb);
}

/* Is the block something that may be written, and stays as large as it is? */
static bool memory_fits(const RAMBlock *rb, DedupBlockReason *reason)
{
    if (rb->flags & RAM_PREALLOC || memory_region_is_ram_device(rb->mr)) {
        *reason = DEDUP_BLOCK_REASON_DEVICE_MEMORY;
    } else if (rb->flags & RAM_RESIZEABLE) {
        *reason = DEDUP_BLOCK_REASON_RESIZEABLE;
    } else if (rb->flags & (RAM_READONLY | RAM_READONLY_FD) ||
               memory_region_is_rom(rb->mr) ||
               memory_region_is_romd(rb->mr)) {
        *reason = DEDUP_BLOCK_REASON_READ_ONLY;
    } else {
        return true;
    }
    return false;
}

/* Was the memory asked for such that a page of it may be replaced? */
static bool backend_fits(const DedupBlock *block,
                         const HostMemoryBackend *backend,
                         DedupBlockReason *reason)
{
    const RAMBlock *rb = block->rb;

    if (!backend) {
        *reason = DEDUP_BLOCK_REASON_NOT_BACKEND;
    } else if (rb->flags & RAM_PMEM) {
        *reason = DEDUP_BLOCK_REASON_PMEM;
    } else if (rb->page_size != qemu_real_host_page_size()) {
        *reason = DEDUP_BLOCK_REASON_HUGE_PAGES;
    } else if (rb->fd < 0 ? block_is_shared(block) : !block_is_tmpfs(block)) {
        *reason = DEDUP_BLOCK_REASON_NOT_TMPFS;
    } else if (!backend->merge) {
        *reason = DEDUP_BLOCK_REASON_MERGE_OFF;
    } else if (backend->prealloc) {
        *reason = DEDUP_BLOCK_REASON_PREALLOC;
    } else if (backend->policy != HOST_MEM_POLICY_DEFAULT) {
        *reason = DEDUP_BLOCK_REASON_HOST_NODES;
    } else {
        return true;
    }
    return false;
}

/*
 * A DIMM that was unplugged: nobody can reach the memory, so it may stay
 * merged until the backend goes or a device takes it.  But if the file has a
 * name its contents are wanted when the backend goes, and must be there
 * without delay.
 */
static bool may_stay_unmapped(const DedupBlock *block)
{
    return block->eligible && !block->named;
}

/* @reason is undefined if the block is eligible. */
bool dedup_block_eligible(DedupScanner *ds, const DedupBlock *block,
                          DedupBlockReason *reason)
{
    RAMBlock *rb = block->rb;
    HostMemoryBackend *backend = (HostMemoryBackend *)object_dynamic_cast(
        memory_region_owner(rb->mr), TYPE_MEMORY_BACKEND);
    bool mapped = backend && host_memory_backend_is_mapped(backend);

    if (!memory_fits(rb, reason) || !backend_fits(block, backend, reason)) {
        return false;
    }
    if (!mapped && !may_stay_unmapped(block)) {
        *reason = DEDUP_BLOCK_REASON_NOT_MAPPED;
    } else if (mapped && !backend_is_ram(backend)) {
        *reason = DEDUP_BLOCK_REASON_DEVICE_BACKEND;
    } else if (!dedup_scanner_estimates(ds) &&
               (ram_guard_is_whole(rb) || migration_keeps_whole(ds, block))) {
        *reason = DEDUP_BLOCK_REASON_EXPORTED;
    } else {
        return true;
    }
    return false;
}

void dedup_block_info(const DedupBlock *block, DedupRegionInfo *info)
{
    RAMBlock *rb = block->rb;
    HostMemoryBackend *backend = MEMORY_BACKEND(memory_region_owner(rb->mr));

    *info = (DedupRegionInfo) {
        .id = dedup_block_id(block),
        .host = rb->host,
        .size = rb->used_length,
        .memory = rb->fd < 0 ? DEDUP_MEMORY_ANON
                  : block_is_shared(block) ? DEDUP_MEMORY_SHARED
                  : DEDUP_MEMORY_PRIVATE_FILE,
        .fd = rb->fd,
        .fd_offset = rb->fd_offset,
        .pins = ram_guard_dma_maps(rb, true),
        .readers = ram_guard_dma_maps(rb, false),
        .flags = DEDUP_REGION_HUGEPAGE,
    };
    /* As ram_block_add() and the memory backend did. */
    if (!qtest_enabled()) {
        info->flags |= DEDUP_REGION_DONTFORK;
    }
    if (!backend->dump || !machine_dump_guest_core(current_machine)) {
        info->flags |= DEDUP_REGION_DONTDUMP;
    }
    if (rb->flags & RAM_NORESERVE) {
        info->flags |= DEDUP_REGION_NORESERVE;
    }
}
