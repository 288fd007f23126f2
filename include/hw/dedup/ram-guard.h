/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the rest of QEMU tells whoever replaces guest RAM under a running VM
 *
 * Something (the memory deduplication scanner, hw/dedup/) may exchange the
 * host memory behind a guest page for other memory with the same contents.
 * That is invisible to everybody who reaches guest RAM through page tables.
 * It is not invisible to three kinds of users, and each has calls here:
 *
 * - I/O that the kernel completes by DMA into pages that it pinned earlier:
 *   counted per chunk, from address_space_map() to address_space_unmap();
 * - whoever takes memory away from guest RAM (discards): a hook is called
 *   first, so that the block's own mapping is back in place;
 * - whoever hands out the RAM's file descriptor or maps the RAM's file:
 *   needs RAM to be "whole", that is all contents in the block's own memory.
 *
 * The calls are cheap and correct when nobody replaces anything.
 *
 * Who replaces RAM registers RamGuardOps; there is at most one.
 */

#ifndef HW_DEDUP_RAM_GUARD_H
#define HW_DEDUP_RAM_GUARD_H

#include "exec/cpu-common.h"

/* One counter stands for this many bytes of a block: 64 KiB. */
#define RAM_GUARD_CHUNK_SHIFT 16

/* Somebody who needs RAM whole: from ram_guard_whole_get() to _put(). */
typedef struct RamGuardUser RamGuardUser;

/* A discard under way, see ram_guard_discard_begin(). */
typedef struct RamGuardDiscard {
    struct RamGuard *guard;
} RamGuardDiscard;

/**
 * struct RamGuardOps - what the one who replaces RAM does when it is told
 *
 * @discard_begin: memory of @rb from @start on is about to be thrown away by
 *   madvise() or fallocate().  Put the block's own mapping back there, the
 *   contents need not survive, and replace nothing until @discard_end.
 *   Called on any thread, with or without the BQL; must not take the BQL, nor
 *   may the caller before @discard_end.  Returns false if the memory
 *   for it cannot be had; then nothing is discarded, and @discard_end is not
 *   called.  With @rb NULL nothing is discarded, only nothing replaced;
 *   cannot fail.
 *
 * @discard_end: the memory is gone.  Same thread.
 *
 * @whole_begin: stop replacing memory of @rb (of all blocks if @rb is NULL),
 *   and give every page there memory of its own.  Called with the BQL held,
 *   on any thread; may release and take the BQL while it waits, and must
 *   when it waits for long.  May be called again for the same @rb while it
 *   is whole or on the way.  Returns false with @errp set if the memory
 *   cannot be had; what it had restored by then may stay restored.
 *
 * @whole_end: nobody needs @rb (all blocks if NULL) whole any more; also
 *   called when the only @whole_begin failed.  Called with the BQL held.
 *   RAM that is still needed by a get of the other kind stays whole:
 *   see ram_guard_is_whole().
 *
 * @prepare_remove: @rb, which nobody uses any more, is about to be removed;
 *   do now what would last long then.  Called with the BQL held; may release
 *   and take it while it waits.  Returns false with @errp set if the contents
 *   of a file that outlives @rb cannot be had.
 *
 * @needs_discards: is this why discards cannot be disabled now?  Any thread.
 *
 * @windows: how many parts of RAM the kernel must not write to now, because
 *   a system call that does would fail; read atomically.  NULL: it can always
 *   wait.
 * @wait_window: wait until no such part is left of a host range.  Called only
 *   if there was one, on any thread, with or without the BQL; must not take
 *   the BQL.
 * @kernel_writers_changed: see ram_guard_kernel_writer_get().  BQL held.
 */
typedef struct RamGuardOps {
    bool (*discard_begin)(void *opaque, RAMBlock *rb, ram_addr_t start,
                          size_t length);
    void (*discard_end)(void *opaque);
    bool (*whole_begin)(void *opaque, RAMBlock *rb, Error **errp);
    void (*whole_end)(void *opaque, RAMBlock *rb);
    bool (*prepare_remove)(void *opaque, RAMBlock *rb, Error **errp);
    bool (*needs_discards)(void *opaque);
    const unsigned *windows;
    void (*wait_window)(void *opaque, void *host, size_t length);
    void (*kernel_writers_changed)(void *opaque);
} RamGuardOps;

#ifdef CONFIG_LINUX

/**
 * ram_guard_register - become the one who replaces guest RAM
 * @ops: what to call; must stay valid until ram_guard_unregister()
 * @opaque: passed to every call
 *
 * BQL held.  Does not call back for users that are there already: look at
 * ram_guard_is_whole() before anything is replaced.
 *
 * Returns: false if somebody else is registered.
 */
bool ram_guard_register(const RamGuardOps *ops, void *opaque);

/**
 * ram_guard_unregister - undo ram_guard_register()
 *
 * BQL held.  When it returns no callback is running, nor will be: waits for
 * discards that are under way, a system call each.  Must not
 * be called while @whole_begin or @prepare_remove runs, see
 * ram_guard_whole_busy().
 */
void ram_guard_unregister(void);

/* Is a callback waiting without the BQL?  BQL held. */
bool ram_guard_whole_busy(void);

/* Set up and free what a block carries for this file. */
void ram_guard_block_add(RAMBlock *rb);
void ram_guard_block_free(RAMBlock *rb);

/**
 * ram_guard_dma_map - I/O is going to read or write bytes of a block
 * @rb: the block
 * @start: offset in the block
 * @length: how many bytes; 0 is nothing
 * @is_write: the I/O writes to the memory
 *
 * Any thread.  A full barrier: what the caller does next is ordered after
 * it.  Raises the counter of each chunk that the bytes touch.  If @is_write,
 * and a system call that writes there would fail now, waits until it would
 * not: a part of a millisecond, as a rule.
 */
void ram_guard_dma_map(RAMBlock *rb, ram_addr_t start, ram_addr_t length,
                       bool is_write);

/**
 * ram_guard_dma_unmap - the I/O is done
 *
 * As ram_guard_dma_map().  Unmapping less than was mapped leaves the other
 * chunks counted for ever, which is safe.
 */
void ram_guard_dma_unmap(RAMBlock *rb, ram_addr_t start, ram_addr_t length,
                         bool is_write);

/**
 * ram_guard_dma_exempt - what was just mapped is not for the kernel to pin
 * @ptr: what address_space_map() returned; NULL and bounce buffers are fine
 * @length: how much it mapped
 * @is_write: as it was told
 *
 * Takes back what address_space_map() counted.  For who keeps memory mapped
 * for long, and reaches it through page tables only: the CPU's, or the
 * kernel's copy_to_user().  Needs ram_guard_dma_unexempt() right before
 * address_space_unmap().
 */
void ram_guard_dma_exempt(void *ptr, ram_addr_t length, bool is_write);

/**
 * ram_guard_dma_unexempt - it is about to be unmapped
 *
 * The same arguments as for address_space_unmap(), which counts in the other
 * direction: so this is balanced even if they are not those of the map.
 */
void ram_guard_dma_unexempt(void *ptr, ram_addr_t length, bool is_write);

/**
 * ram_guard_dma_maps - the counters of a block, for writes or for reads
 *
 * One for every 1 << RAM_GUARD_CHUNK_SHIFT bytes of @rb->max_length; not 0
 * while I/O may be under way there.  Read them after write access to the
 * memory was taken away and a full barrier: then a 0 says that no I/O that
 * bypasses the page tables is under way, and none that writes can begin
 * before access is given back.
 * Valid as long as the block is (RCU).
 */
const uint16_t *ram_guard_dma_maps(const RAMBlock *rb, bool is_write);

/**
 * ram_guard_discard_begin - memory of a block is about to be discarded
 * @d: what ram_guard_discard_end() needs; set in any case
 * @rb: the block
 * @start: offset in the block
 * @length: how many bytes
 *
 * Any thread.  Call it before madvise() or fallocate(), and the other one
 * after: in between nothing is replaced, and the caller must not touch guest
 * RAM, nor take the BQL.  The caller sees to it that @rb stays (BQL or RCU).
 *
 * Returns: false when the memory must not be discarded, because the block's
 * own mapping could not be put back: out of memory.
 */
bool ram_guard_discard_begin(RamGuardDiscard *d, RAMBlock *rb,
                             ram_addr_t start, size_t length);

/**
 * ram_guard_discard_host_begin - the same, by host address
 *
 * An address outside guest RAM is nothing to care about: returns true.
 */
bool ram_guard_discard_host_begin(RamGuardDiscard *d, void *host,
                                  size_t length);

/**
 * ram_guard_hold - replace nothing until ram_guard_discard_end()
 * @d: what that needs
 *
 * Any thread.  For short: somebody may be waiting.
 */
void ram_guard_hold(RamGuardDiscard *d);

/**
 * ram_guard_explain_busy - say why discards of memory cannot be disabled
 *
 * For those who got -EBUSY: if it is because somebody replaces RAM, names it
 * and what to do about it, by error_report().
 */
void ram_guard_explain_busy(void);

/**
 * ram_guard_busy_hint - the same for the end of an error message
 *
 * Returns: a text that begins with a comma, or "".
 */
const char *ram_guard_busy_hint(void);

/**
 * ram_guard_discard_end - the memory is gone, or will not go
 * @d: zeroed, or set by one of the above; nothing is done if that failed
 */
void ram_guard_discard_end(RamGuardDiscard *d);

/**
 * ram_guard_kernel_writer_get - the kernel will write to RAM by itself
 * @name: who has it do so, for people to read: "vhost-net"
 *
 * For threads of the kernel that reach guest RAM through page tables, without
 * ram_guard_dma_map(), when no thread of QEMU could wait for them (vhost).
 * Before they may begin: from then on RAM is replaced only in ways that make
 * them wait.  BQL held.
 */
void ram_guard_kernel_writer_get(const char *name);

/** ram_guard_kernel_writer_put - it has ended.  The same @name.  BQL held. */
void ram_guard_kernel_writer_put(const char *name);

/**
 * ram_guard_kernel_writers - who has the kernel write to RAM
 *
 * BQL held.  Returns: their names, joined by ", "; NULL if there is none.  To
 * be freed.
 */
char *ram_guard_kernel_writers(void);

/**
 * ram_guard_may_take - memory is wanted that guest RAM must not use up
 * @change: how many bytes more than before, or fewer
 *
 * For buffers that are made when a guest needs them (the area of a vhost-user
 * relay): whoever replaces RAM leaves so much of what the host and the cgroup
 * have.  Any thread.
 */
void ram_guard_may_take(int64_t change);

/* The sum; read atomically. */
const uint64_t *ram_guard_may_be_taken(void);

/**
 * ram_guard_whole_get - make RAM whole and keep it so
 * @user: where to store the handle; must point to NULL
 * @rb: the block, or NULL for all RAM, also of blocks that are added later
 * @name: who needs it, for people to read: "vhost-user (chardev 'c0')"
 * @errp: set on failure: not enough memory for the copies
 *
 * BQL held.  It may be released and taken again inside: call it first thing
 * in realize, before anything is set up, and before the fd is handed out.
 *
 * Returns: false when the memory cannot be had; nothing is held then.
 */
bool ram_guard_whole_get(RamGuardUser **user, RAMBlock *rb, const char *name,
                         Error **errp);

/**
 * ram_guard_whole_put - the RAM need not be whole any more for @user
 * @user: set by ram_guard_whole_get(), is set to NULL; if it points to NULL
 *   nothing is done
 *
 * BQL held.
 */
void ram_guard_whole_put(RamGuardUser **user);

/**
 * ram_guard_prepare_remove - the block is about to be removed
 * @rb: the block; nobody uses it any more
 * @errp: set on failure: not enough memory for the copies
 *
 * BQL held.  It may be released and taken again inside.
 *
 * Returns: false when the file behind the block cannot be made whole: then
 * the block must stay, or its contents are lost to who reads the file.
 */
bool ram_guard_prepare_remove(RAMBlock *rb, Error **errp);

/**
 * ram_guard_is_whole - must this block stay whole?
 * @rb: a block; NULL asks for all RAM
 *
 * BQL held.  For a block true also if all RAM must stay whole.
 */
bool ram_guard_is_whole(const RAMBlock *rb);

/**
 * ram_guard_whole_users - who needs exactly this block, or (NULL) all RAM
 *
 * BQL held.
 *
 * Returns: their names, joined by ", "; NULL if there is none.  To be freed.
 */
char *ram_guard_whole_users(const RAMBlock *rb);

#else /* !CONFIG_LINUX: nobody replaces RAM */

static inline void ram_guard_block_add(RAMBlock *rb)
{
}

static inline void ram_guard_block_free(RAMBlock *rb)
{
}

static inline void ram_guard_dma_map(RAMBlock *rb, ram_addr_t start,
                                     ram_addr_t length, bool is_write)
{
}

static inline void ram_guard_dma_unmap(RAMBlock *rb, ram_addr_t start,
                                       ram_addr_t length, bool is_write)
{
}

static inline void ram_guard_dma_exempt(void *ptr, ram_addr_t length,
                                        bool is_write)
{
}

static inline void ram_guard_dma_unexempt(void *ptr, ram_addr_t length,
                                          bool is_write)
{
}

static inline bool ram_guard_discard_begin(RamGuardDiscard *d, RAMBlock *rb,
                                           ram_addr_t start, size_t length)
{
    return true;
}

static inline bool ram_guard_discard_host_begin(RamGuardDiscard *d,
                                                void *host, size_t length)
{
    return true;
}

static inline void ram_guard_discard_end(RamGuardDiscard *d)
{
}

static inline void ram_guard_hold(RamGuardDiscard *d)
{
}

static inline void ram_guard_explain_busy(void)
{
}

static inline const char *ram_guard_busy_hint(void)
{
    return "";
}

static inline void ram_guard_kernel_writer_get(const char *name)
{
}

static inline void ram_guard_kernel_writer_put(const char *name)
{
}

static inline void ram_guard_may_take(int64_t change)
{
}

static inline bool ram_guard_whole_get(RamGuardUser **user, RAMBlock *rb,
                                       const char *name, Error **errp)
{
    return true;
}

static inline void ram_guard_whole_put(RamGuardUser **user)
{
}

static inline bool ram_guard_prepare_remove(RAMBlock *rb, Error **errp)
{
    return true;
}

#endif /* CONFIG_LINUX */

#endif /* HW_DEDUP_RAM_GUARD_H */
