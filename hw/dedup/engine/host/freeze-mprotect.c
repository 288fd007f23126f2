/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Freezing by mprotect(), for hosts that grant no userfaultfd.
 *
 * The range becomes read-only.  A thread that stores to it gets a SIGSEGV; the
 * handler finds the address in the table of open windows, waits on a futex for
 * the window's end, and returns: the store is tried again.  Any other SIGSEGV
 * goes on to whoever had it before.
 *
 * A thread that has SIGSEGV blocked would be killed: those of QEMU have not
 * (qemu_thread_create()), and those of libraries write to guest RAM only where
 * that is counted as DMA.
 *
 * The handler takes no lock and no memory.  A window's entry is its freezer's
 * own slot: two words for the range, and a generation that is odd while the
 * window is open, on which the futex is.
 *
 * A thread may meet a frozen page, and come to the handler when the window has
 * long ended.  Then no entry has its address, and the kernel is asked whether a
 * store would succeed now: MADV_POPULATE_WRITE does what the store will do.
 * If so, it is tried again.  Should a new window have come in between, its
 * entry has the address, or the number of windows is another one.
 *
 * A system call that writes to a read-only page fails instead of waiting, so
 * no page may be frozen to which one may write: who raises a pin counter
 * calls dedup_freeze_wait() then, and who has announced a window looks at the
 * counters of its whole range before he freezes it.  Either sees the other.
 *
 * Readers never wait: nothing is ever taken out of the page table but by the
 * call that puts something in its place.
 *
 * Whatever KSM does to a page, a mapping that is read-only lets no store pass.
 * The same goes for huge pages that are split.
 */

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "host/error.h"
#include "host/freeze-ops.h"
#include "host/handler.h"
#include "host/mutant.h"
#include "host/page.h"
#include "host/sys.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* One for each freezer of the process: QEMU has one. */
#define SLOTS 64
/* Can a handler tell a store from a load? */
#ifdef REG_ERR
#define HAS_REASON true
#else
#define HAS_REASON false
#endif
/* The kernel has no memory to thaw with: how long until it is tried again. */
#define THAW_PAUSE_NS 1000000

typedef struct Slot {
    uint32_t generation;      /* atomic, the futex; odd: open */
    uint32_t waiters;         /* atomic: threads in the handler */
    uintptr_t start;          /* atomic; valid while it is open */
    uintptr_t end;
    pid_t owner;              /* atomic: who has opened it */
    bool taken;               /* slots_lock */
} Slot;

static Slot slots[SLOTS];
static unsigned windows;      /* atomic: that are open */
static GMutex slots_lock;
static bool installed;        /* slots_lock: for ever */
static struct sigaction before; /* written before the handler is there */

static void futex_wait(uint32_t *word, uint32_t value)
{
    sys_futex(word, FUTEX_WAIT_PRIVATE, value);
}

static void futex_wake(uint32_t *word)
{
    sys_futex(word, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

/* ---- who waits ---- */

typedef enum Found {
    FOUND_NONE,
    FOUND_WAITED,             /* for the end of a window that has the range */
    FOUND_OWN,                /* the caller has opened it itself */
} Found;

/* Wait for the window of this slot, if it has any of [start, end). */
static Found wait_for_slot(Slot *s, uintptr_t start, uintptr_t end)
{
    uint32_t generation = __atomic_load_n(&s->generation, __ATOMIC_SEQ_CST);
    Found found = FOUND_NONE;

    while (generation & 1) {
        /* each before the generation is looked at again */
        uintptr_t from = __atomic_load_n(&s->start, __ATOMIC_ACQUIRE);
        uintptr_t to = __atomic_load_n(&s->end, __ATOMIC_ACQUIRE);
        pid_t owner = __atomic_load_n(&s->owner, __ATOMIC_ACQUIRE);
        uint32_t again;

        again = __atomic_load_n(&s->generation, __ATOMIC_SEQ_CST);
        if (again != generation) {
            generation = again;
            continue;
        }
        if (start >= to || end <= from) {
            return found;
        }
        if (owner == gettid()) {
            return FOUND_OWN;
        }
        if (DEDUP_MUTANT(NO_WAIT)) {
            return FOUND_WAITED;
        }
        found = FOUND_WAITED;
        __atomic_fetch_add(&s->waiters, 1, __ATOMIC_SEQ_CST);
        futex_wait(&s->generation, generation);
        __atomic_fetch_sub(&s->waiters, 1, __ATOMIC_SEQ_CST);
        generation = __atomic_load_n(&s->generation, __ATOMIC_SEQ_CST);
    }
    return found;
}

static Found wait_for_range(uintptr_t start, uintptr_t end)
{
    Found found = FOUND_NONE;

    for (unsigned i = 0; i < SLOTS && found != FOUND_OWN; i++) {
        found = MAX(found, wait_for_slot(&slots[i], start, end));
    }
    return found;
}

/* Changes whenever a window opens or ends. */
static uint32_t count_generations(void)
{
    uint32_t sum = 0;

    for (unsigned i = 0; i < SLOTS; i++) {
        sum += __atomic_load_n(&slots[i].generation, __ATOMIC_SEQ_CST);
    }
    return sum;
}

const unsigned *dedup_freeze_windows(void)
{
    return &windows;
}

void dedup_freeze_wait(const void *addr, size_t len)
{
    if (!DEDUP_MUTANT(DMA_NO_WAIT)) {
        wait_for_range((uintptr_t)addr, (uintptr_t)addr + len);
    }
}

/* ---- the handler ---- */

/* Is nothing mapped there?  The failure of a replacement may leave a hole. */
static bool is_hole(void *page)
{
    unsigned char vec;

    return sys_mincore(page, DEDUP_PAGE_SIZE, &vec) < 0 && errno == ENOMEM;
}

/* Was it a store?  Only x86 says so in this way. */
static bool is_store(const void *context)
{
#ifdef REG_ERR
    const ucontext_t *uc = context;

    return uc->uc_mcontext.gregs[REG_ERR] & 2;
#else
    return false;
#endif
}

/*
 * Would a store pass, if it were tried again?  Where memory is short the store
 * itself may wait for some, and this does not: it says EINVAL if the mapping is
 * read-only, and ENOMEM also if there is none.
 */
static bool would_pass(void *page)
{
    return sys_madvise(page, DEDUP_PAGE_SIZE, MADV_POPULATE_WRITE) == 0 ||
           ((errno == ENOMEM || errno == EAGAIN) && !is_hole(page));
}

/* Was it one of ours?  Then whoever did it may try again. */
static bool is_ours(const siginfo_t *info, const void *context)
{
    uintptr_t addr = (uintptr_t)info->si_addr;
    void *page = (void *)(addr & -DEDUP_PAGE_SIZE);
    uint32_t generations;

    if (info->si_code != SEGV_ACCERR && info->si_code != SEGV_MAPERR) {
        return false;
    }
    do {
        generations = count_generations();
        switch (wait_for_range(addr, addr + 1)) {
        case FOUND_WAITED:
            return true;
        case FOUND_OWN:
            return false;
        case FOUND_NONE:
            break;
        }
        if (generations && is_store(context) && would_pass(page)) {
            return true; /* its window has ended */
        }
    } while (count_generations() != generations);
    return false;
}

static void handle(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    bool ours = is_ours(info, context);

    errno = saved;
    if (!ours) {
        dedup_handler_pass_on(&before, number, info, context);
    }
}

/* It stays for ever: a thread that met a window may come to it late. */
static bool install(GError **error)
{
    installed = installed || dedup_handler_install(SIGSEGV, handle, &before);
    if (!installed) {
        dedup_error_errno(error, "cannot handle SIGSEGV");
    }
    return installed;
}

/* ---- life ---- */

/* Linux 5.14 */
static bool can_populate(void)
{
    void *page = sys_mmap(NULL, DEDUP_PAGE_SIZE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool ok;

    if (page == MAP_FAILED) {
        return false;
    }
    ok = sys_madvise(page, DEDUP_PAGE_SIZE, MADV_POPULATE_WRITE) == 0;
    sys_munmap(page, DEDUP_PAGE_SIZE);
    return ok;
}

static bool mprotect_open(DedupFreezer *f, GError **error)
{
    bool ok = false;

    if (!HAS_REASON) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "write-protection by mprotect is for x86 hosts only");
        return false;
    }
    if (!can_populate()) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "write-protection by mprotect needs Linux 5.14 or newer");
        return false;
    }
    g_mutex_lock(&slots_lock);
    for (unsigned i = 0; i < SLOTS && !ok && install(error); i++) {
        if (!slots[i].taken) {
            slots[i].taken = ok = true;
            f->slot = i;
        }
    }
    if (!ok && installed) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "there are %d dedup engines in this process already",
                    SLOTS);
    }
    g_mutex_unlock(&slots_lock);
    return ok;
}

static void mprotect_close(DedupFreezer *f)
{
    g_mutex_lock(&slots_lock);
    slots[f->slot].taken = false;
    g_mutex_unlock(&slots_lock);
}

static bool mprotect_survives_split(DedupFreezer *f, int pagemap_fd)
{
    return true; /* it is the mapping that is protected */
}

/* ---- a window ---- */

static void mprotect_announce(DedupFrozen *z)
{
    Slot *s = &slots[z->freezer->slot];

    g_assert(!(s->generation & 1));
    __atomic_store_n(&s->start, (uintptr_t)z->addr, __ATOMIC_RELAXED);
    __atomic_store_n(&s->end, (uintptr_t)z->addr + z->len, __ATOMIC_RELAXED);
    __atomic_store_n(&s->owner, gettid(), __ATOMIC_RELAXED);
    __atomic_fetch_add(&s->generation, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&windows, 1, __ATOMIC_SEQ_CST);
}

static void mprotect_withdraw(DedupFrozen *z)
{
    Slot *s = &slots[z->freezer->slot];

    __atomic_fetch_sub(&windows, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&s->generation, 1, __ATOMIC_SEQ_CST);
    /* who waits has counted itself before it compares the generation */
    if (__atomic_load_n(&s->waiters, __ATOMIC_SEQ_CST) &&
        !DEDUP_MUTANT(NO_WAKE)) {
        futex_wake(&s->generation);
    }
}

/*
 * In one call, which fails behind a hole; else in halves.  False: a page of it
 * is protected still, for want of memory.
 */
static bool thaw(uint8_t *addr, size_t len)
{
    size_t half = len / 2 & -DEDUP_PAGE_SIZE;
    bool ok;

    if (sys_mprotect(addr, len, PROT_READ | PROT_WRITE) == 0) {
        return true;
    }
    if (!half) {
        return is_hole(addr);
    }
    ok = thaw(addr, half);
    return thaw(addr + half, len - half) && ok;
}

/* Always (I3), however long it takes. */
static void thaw_all(DedupFrozen *z)
{
    const struct timespec pause = { .tv_nsec = THAW_PAUSE_NS };

    while (!thaw(z->addr, z->len)) {
        nanosleep(&pause, NULL);
    }
}

static bool mprotect_begin(DedupFrozen *z, bool missing)
{
    int saved;

    if (sys_mprotect(z->addr, z->len, PROT_READ) == 0) {
        return true;
    }
    saved = errno;
    thaw_all(z);
    mprotect_withdraw(z);
    errno = saved;
    return false;
}

static bool mprotect_is_waited_for(const DedupFrozen *z)
{
    return __atomic_load_n(&slots[z->freezer->slot].waiters,
                           __ATOMIC_SEQ_CST);
}

static void mprotect_end(DedupFrozen *z)
{
    thaw_all(z);
    mprotect_withdraw(z);
}

const DedupFreezeOps dedup_freeze_mprotect = {
    .keeps_ksm_out = true,
    .fails_in_kernel = true,
    .open = mprotect_open,
    .close = mprotect_close,
    .survives_split = mprotect_survives_split,
    .announce = mprotect_announce,
    .withdraw = mprotect_withdraw,
    .begin = mprotect_begin,
    .is_waited_for = mprotect_is_waited_for,
    .end = mprotect_end,
};
