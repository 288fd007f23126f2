/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine's tests share: RAM of each kind with a shadow of what it
 * must hold, an engine with its thread, waiting for events with a deadline,
 * and the view from outside: what /proc, the file system and the memory
 * cgroup say, as opposed to the engine's own counters.
 *
 * Terms:
 *   RAM      a region's memory, standing for a guest's
 *   shadow   the bytes that it must hold, in memory that nobody merges
 *   symptom  what a failure looks like, in words that test-dedup-mutants.c
 *            looks for: "lost store", "zero page", "foreign bytes",
 *            "writer hangs", ...
 *
 * A store to RAM by the test stands for a guest's: it is no C program to
 * the engine, so functions that do it while a scanner runs are free of
 * sanitizer instrumentation (FX_GUEST).
 *
 * Thread: the test's main thread, unless a comment says otherwise.
 */

#ifndef ENGINE_FIXTURE_H
#define ENGINE_FIXTURE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine.h"
#include "host/sys.h"
#include "patience.h"

/* volatile: what it points at changes behind the compiler's back */
typedef volatile uint64_t FxWord;
/* volatile: as above */
typedef volatile uint8_t FxByte;

#define FX_PAGE 4096u
#define FX_GUEST __attribute__((no_sanitize("thread", "address", \
                                            "undefined"), noinline))

/* Built with a sanitizer: it has memory of its own, which figures would see. */
#ifdef CONFIG_FX_SANITIZED
#define FX_SANITIZED true
#else
#define FX_SANITIZED false
#endif

/*
 * Seconds after which something that must happen is said not to.  Long: it
 * bounds a hang, and must hold on a host that does other work.
 */
#define FX_DEADLINE (180 * test_patience())

/* Without progress for so long a thread is said to hang; in microseconds. */
gint64 fx_hang_us(void);

/* Say what the failure looks like, and end the process. */
void fx_fail(const char *symptom, const char *format, ...)
    G_GNUC_PRINTF(2, 3) G_GNUC_NORETURN;

/*
 * To be called first in main(): as g_test_init(); a crash leaves no core
 * file; user code of the tests may see mutants by $DEDUP_MUTANT.  Where a
 * userfaultfd is wanted, and the host grants none, the program ends here,
 * skipped.
 */
void fx_init(int *argc, char ***argv);

/* How engines of the tests freeze: $DEDUP_TEST_FREEZE, "mprotect" or none. */
extern DedupFreezeHow fx_freeze;
/* And what keeps vCPUs out of their windows: nothing. */
extern DedupExclusiveFn *fx_exclusive;

/* ---- RAM ---- */

typedef enum FxKind {
    FX_MEMFD,       /* memfd, shared */
    FX_TMPFS,       /* file with a name on tmpfs, shared */
    FX_ANON,        /* anonymous, 4 KiB pages */
    FX_ANON_THP,    /* anonymous, transparent huge pages wanted */
    FX_PRIVATE,     /* memfd, private */
    FX_KINDS
} FxKind;

typedef struct FxRam {
    FxKind kind;
    uint8_t *host;
    uint8_t *shadow;
    uint32_t npages;
    int fd;                 /* -1: anonymous */
    uint16_t *pins;         /* one counter per 64 KiB */
    uint16_t *readers;      /* likewise */
    DedupRegion *region;    /* while an engine has it */
    void *map;              /* with the slack of the alignment */
    size_t map_size;
} FxRam;

const char *fx_kind_name(FxKind kind);

/* Memory without contents, aligned to 2 MiB; DONTFORK as QEMU sets it. */
FxRam *fx_ram_new(FxKind kind, uint32_t npages);
/*
 * More than the host has, of which little is used: to be added with
 * DEDUP_REGION_NORESERVE, and not to be looked at as a whole.
 */
FxRam *fx_ram_new_vast(FxKind kind, uint32_t npages);
/* RAM on a file of the caller's, which it takes over. */
FxRam *fx_ram_new_file(FxKind kind, uint32_t npages, int fd);
void fx_ram_free(FxRam *ram);
/* A file on a tmpfs that takes huge pages; -1: may not be had here. */
int fx_huge_tmpfs_file(void);

/* The bytes that a seed stands for; 0 is a page of zeros. */
void fx_content(void *page, uint64_t seed);

static inline uint8_t *fx_addr(const FxRam *ram, uint32_t page)
{
    return ram->host + (size_t)page * FX_PAGE;
}

/* Store a whole page, or one byte of it, to RAM and to the shadow. */
void fx_page(FxRam *ram, uint32_t page, uint64_t seed);
void fx_byte(FxRam *ram, uint32_t page, uint32_t at, uint8_t value);

/*
 * A system call is about to write to a page, or was: raises or lowers the
 * counter of its 64 KiB.  To be called where that would fail in a frozen page,
 * and for what bypasses the page tables.
 */
static inline void fx_pin(FxRam *ram, uint32_t page)
{
    __atomic_fetch_add(&ram->pins[page >> (DEDUP_PIN_SHIFT - 12)], 1,
                       __ATOMIC_SEQ_CST);
    if (__atomic_load_n(dedup_engine_windows(), __ATOMIC_SEQ_CST)) {
        dedup_engine_wait_window(fx_addr(ram, page), FX_PAGE);
    }
}

static inline void fx_unpin(FxRam *ram, uint32_t page)
{
    __atomic_fetch_sub(&ram->pins[page >> (DEDUP_PIN_SHIFT - 12)], 1,
                       __ATOMIC_SEQ_CST);
}

/* The shadow alone: what somebody else stored or dropped. */
void fx_shadow_page(FxRam *ram, uint32_t page, uint64_t seed);

/* Every byte of every page is what the shadow says; any thread. */
void fx_assert_bytes(const FxRam *ram);
void fx_assert_page(const FxRam *ram, uint32_t page, const void *expected);

/* ---- an engine with its thread ---- */

typedef struct FxEngine {
    DedupEngine *e;
    GThread *thread;
    GMutex lock;
    GCond cond;
    DedupState state;
    bool restored;          /* the callback came */
    uint64_t left;
    char *message;          /* its error */
} FxEngine;

/* @dir: the group's directory, or NULL.  Not started. */
FxEngine *fx_engine_new(const char *dir);
FxEngine *fx_engine_new_mode(const char *dir, DedupMode mode);
/* NULL and @error if there is none. */
FxEngine *fx_engine_try(const char *dir, DedupMode mode, GError **error);
void fx_engine_start(FxEngine *fe);
void fx_engine_stop(FxEngine *fe);
/* Stops it if need be. */
void fx_engine_free(FxEngine *fe);

void fx_add(FxEngine *fe, FxRam *ram);
/* What is said of it in general: DEDUP_REGION_*. */
unsigned fx_flags(const FxRam *ram);
void fx_add_flags(FxEngine *fe, FxRam *ram, unsigned flags);
bool fx_try_add(FxEngine *fe, FxRam *ram, unsigned flags, GError **error);
void fx_remove(FxRam *ram, bool keep_contents);

void fx_stats(FxEngine *fe, DedupStats *stats);
void fx_set_run(FxEngine *fe, bool run);

/* @n more full passes that began after this call. */
void fx_wait_scans(FxEngine *fe, unsigned n);
void fx_wait_state(FxEngine *fe, DedupState state);
/* Passes that found nothing more to do, after this call. */
void fx_wait_settled(FxEngine *fe);
/* Unmerge everything, or start to and wait for its end. */
void fx_unmerge(FxEngine *fe);
void fx_restore_begin(FxEngine *fe, bool unmerge, bool force);
void fx_wait_restored(FxEngine *fe);

/*
 * Waits, looking every millisecond, until @test(@opaque) is true; fails with
 * the symptom "@what" after FX_DEADLINE seconds.
 */
void fx_wait_until(bool (*test)(void *opaque), void *opaque,
                   const char *what);

/* ---- calls to the kernel, for dedup_sys_hook (host/sys.h) ---- */

/* By number: older headers do not have it. */
#define FX_UFFDIO_MOVE _IOWR(0xaa, 0x05, uint64_t[5])
#define FX_UFFDIO_POISON _IOWR(0xaa, 0x08, uint64_t[4])

bool fx_is_call(const DedupSysCall *call, const char *name);
bool fx_is_ioctl(const DedupSysCall *call, unsigned long request);
/* Does it map a part of a segment? */
bool fx_maps_segment(const DedupSysCall *call);
/* What a MAP_FIXED that fails may leave. */
bool fx_leave_hole(const DedupSysCall *call);

/* ---- the view from outside ---- */

/* What is mapped in a RAM's range, by /proc/self/maps and smaps. */
typedef struct FxView {
    uint64_t segment_pages;    /* that segments are mapped to */
    uint64_t distinct;         /* different segment pages among them */
    uint64_t copied;           /* of them: with a copy of their own */
    uint64_t maps;
    uint64_t own_pages;        /* with memory: file blocks, anonymous */
    uint64_t huge_pages;       /* of 2 MiB */
} FxView;

void fx_view(const FxRam *ram, FxView *view);

/* Which pages are mapped from a segment?  One for each. */
void fx_merged(const FxRam *ram, bool *merged);
/* Is this one? */
bool fx_is_merged(const FxRam *ram, uint32_t page);

/* Which pages have memory, a byte each: mincore() or pagemap. */
void fx_resident(const FxRam *ram, uint8_t *resident);

/*
 * Does a read of absent anonymous memory map the kernel's page of zeros?  On
 * some kernels it takes memory, as a write would.
 */
bool fx_has_zero_page(void);

/* All segments (sealed memfds) that this process holds an fd of. */
typedef struct FxSegments {
    uint64_t files;
    uint64_t pages;            /* that have memory */
} FxSegments;

void fx_segments(FxSegments *s);

/* "VmRSS", "RssAnon", ... of /proc/self/status, in bytes. */
uint64_t fx_status(const char *name);
uint64_t fx_maps(void);
uint64_t fx_max_maps(void);

/* ---- processes ---- */

/* @body in a process of its own, made by fork: no thread may exist. */
pid_t fx_fork(void (*body)(void *opaque), void *opaque);
/* The same.  Returns its wait status; it is killed after @seconds. */
int fx_in_child(void (*body)(void *opaque), void *opaque, unsigned seconds);
/* The same; the test fails if it does not exit with 0. */
void fx_must_pass(void (*body)(void *opaque), void *opaque,
                  unsigned seconds);

/* A directory for a group below the temporary directory, mode 0700. */
char *fx_group_dir(void);
void fx_group_dir_free(char *dir);

/* ---- a memory cgroup of our own (version 1 or 2) ---- */

typedef struct FxCgroup FxCgroup;

/*
 * NULL where that cannot be had, and where a sanitizer's memory would be
 * charged to it: then the test was marked as skipped, with the reason.
 */
FxCgroup *fx_cgroup_new(void);
/* Removed by the parent when the child that was in it is gone. */
void fx_cgroup_free(FxCgroup *cg);
/* Move this process into it: what it allocates from now on is charged. */
bool fx_cgroup_enter(FxCgroup *cg);
bool fx_cgroup_limit(FxCgroup *cg, uint64_t bytes);
uint64_t fx_cgroup_usage(FxCgroup *cg);

#endif /* ENGINE_FIXTURE_H */
