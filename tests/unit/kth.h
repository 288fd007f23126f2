/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The k-th call fails: what the files of test-dedup-kth share.
 *
 * A trial is a scenario in which the k-th system call that the engine makes
 * (host/sys.h) goes wrong in one way, and maybe others behind it, until the
 * fault ends.
 *
 * Terms:
 *   fault      an errno, or a short transfer, or one of the things that the
 *              kernel may leave behind when it refuses (KthWay)
 *   reach      how far it goes: that call alone, each of its kind from then
 *              on, or each that lists the errno
 */

#ifndef KTH_H
#define KTH_H

#include "engine-fixture.h"

/* ---- what goes wrong: kth-faults.c ---- */

typedef enum KthWay {
    KTH_REFUSED,            /* nothing has happened */
    KTH_HALF,               /* it is done by half, and then the errno */
    KTH_HOLE,               /* what was mapped there is unmapped */
    KTH_SHORT,              /* no error: less was transferred */
    KTH_NOTHING,            /* no error: nothing was */
    KTH_WAYS
} KthWay;

typedef enum KthReach {
    KTH_ONCE,
    KTH_SAME,               /* calls of this kind, until the fault ends */
    KTH_ALL,                /* whatever lists it; of what tells of the host */
    KTH_REACHES
} KthReach;

typedef struct KthFault {
    unsigned k;             /* 0: none */
    int error;
    KthWay way;
    KthReach reach;
} KthFault;

/* What is known of a call that was made, to choose its faults by. */
typedef struct KthCall {
    char name[20];
    unsigned long arg;
    bool fixed;             /* a mapping in the place of another */
    uint32_t path;          /* a hash of who called whom to make it */
} KthCall;

/* The errnos of @call that a test can ask for; ends with 0. */
const int *kth_errnos(const KthCall *call);
/* Is something short, for whoever asks? */
bool kth_is_condition(int error);
/* Can @call go wrong in this way? */
bool kth_has_way(const KthCall *call, KthWay way);

/* Calls are counted from here on, and the one of @fault goes wrong. */
void kth_begin(const KthFault *fault);
/* Write down each call as well, at most @most. */
void kth_record(KthCall *calls, unsigned most);
/* No call fails any more.  Returns how many calls there were. */
unsigned kth_end(void);
/* How many failed. */
unsigned kth_failures(void);
/* Was a page given up, with UFFDIO_POISON?  Then it may be lost. */
bool kth_poisoned(void);
/* Was munmap() refused?  Then what it was for is there still. */
bool kth_kept_mappings(void);
/* A guest stores to this page: it is never unmapped. */
void kth_keep_mapped(const void *page);
/* The linker's: addr2line wants addresses from there on. */
extern char __executable_start[];
/* Have it noted where the first one was made: KTH_FRAMES return addresses. */
#define KTH_FRAMES 24
void kth_note_where(void **where);

/* ---- what must be true then: kth-checks.c; all fail by fx_fail() ---- */

#define KTH_HOT 56              /* the guest stores to it: not checked */

void kth_check_bytes(const FxRam *ram);
void kth_check_file(const FxRam *ram);
void kth_check_ledger(const FxRam *ram);

/* ---- what the engine does meanwhile: kth-scenarios.c ---- */

typedef struct KthRun {
    FxKind kind;
    char *dir;
    FxRam *ram[2];          /* each member's */
    FxEngine *fe[2];
    struct KthWriter *writer;
} KthRun;

typedef struct KthScenario {
    const char *name;
    void (*prepare)(KthRun *run);
    /* calls fail in here */
    void (*act)(KthRun *run);
    /* and what must work when the fault has ended */
    void (*recover)(KthRun *run);
    bool in_group;
} KthScenario;

extern const KthScenario kth_scenarios[];
extern const unsigned kth_nscenarios;

/* One trial, from nothing to nothing.  Fails by fx_fail().  Returns calls. */
unsigned kth_try(const KthScenario *s, FxKind kind, const KthFault *fault);

#endif /* KTH_H */
