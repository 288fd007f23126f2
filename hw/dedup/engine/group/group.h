/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A group: the processes that share an index and segments, and the shared
 * file (a sealed memfd) with the index, the member slots, the table of
 * segments and who uses them.
 *
 * A group without a directory has one member, this process, and no sockets;
 * all else is the same, so there is one way through the code.
 *
 * Everything in the shared file may be wrong (a hostile or dead member):
 * numbers are bounds-checked here before they are handed out.  Slots, table
 * and usage are read with pread() and written with pwrite(), never through a
 * mapping, so that a hole costs no memory and a lack of memory is an error
 * code.  Only the index is mapped.
 *
 * Owner: whoever made it by dedup_group_new().
 * Threads: the scanner's is the one that joins first, and the only one that
 * may call most of this; that is asserted.  Any thread may call, whether we
 * have joined or not:
 *   _tell(), _tell_reserved(), _member(), _foreach_member(): they take a lock
 *       of the group's own, which comes after the engine's control lock and
 *       before its remap lock
 *   _members(), _is_joined(), _has_dir(), _cpu_ns(): they take none
 */

#ifndef DEDUP_GROUP_H
#define DEDUP_GROUP_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "group/segment.h"
#include "host/hostmem.h"
#include "index/index.h"

#define DEDUP_MAX_MEMBERS (1u << DEDUP_MEMBER_BITS)
/* Segments that can exist at a time: a gid is one of them and a generation. */
#define DEDUP_MAX_SEGMENTS (1u << 18)

typedef struct DedupGroup DedupGroup;

/*
 * What a member tells the others about itself: a slot of the shared file.
 * Written by its owner as a whole, read by all, possibly torn.
 */
typedef struct DedupMemberInfo {
    uint32_t pid;
    uint8_t scanning;         /* 1: it makes passes */
    uint8_t estimates;        /* 1: and publishes nothing */
    uint16_t cpu_wanted;      /* for that, in permille of a core */
    uint64_t pages_total;     /* of the RAM that it scans */
    uint64_t full_scans;
    uint64_t pages_merged;
    uint64_t zero_pages;
    uint64_t overhead_bytes;  /* private metadata and maps */
    uint64_t reserved_bytes;  /* about to be used by a restore */
    uint64_t owed_bytes;      /* its RAM may still grow by this */
    uint64_t cgroups[DEDUP_CGROUP_IDS]; /* see hostmem.h */
} DedupMemberInfo;

/* How one member uses one segment. */
typedef struct DedupSegmentUse {
    uint32_t gid;                              /* 0: does not */
    uint32_t mapped;                           /* guest pages merged to it */
    uint64_t pages[DEDUP_SEGMENT_PAGES / 64];  /* which segment pages */
} DedupSegmentUse;

/* A page of ours, of which others want to know whether we have it. */
typedef struct DedupOwnPage {
    uint32_t page;
    bool is_there;            /* out */
    DedupHash128 hash;        /* out, if it is */
} DedupOwnPage;

/* What the engine answers; for its peers, on the peer thread. */
typedef struct DedupGroupOps {
    /*
     * The keyed hashes of pages of ours.  What does not exist, or is not
     * present, is left as it is, not there.  Must not populate memory (I7).
     */
    void (*keyed_hashes)(void *opaque, DedupOwnPage *pages, unsigned n,
                         const uint8_t *secret);
    /*
     * A duplicate of the fd of segment @gid and the keyed hash of its page
     * @page into @hash; -1 if there is no such segment or page.
     */
    int (*segment_fd)(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash);
    /*
     * Another member has the same as those of our pages that are there, and
     * will publish it: it has been answered.  Or NULL.
     */
    void (*proven)(void *opaque, const DedupOwnPage *pages, unsigned n);
    /* Shall a join or a walk give up?  On the scanner's thread.  Or NULL. */
    bool (*is_stopping)(void *opaque);
} DedupGroupOps;

/* A page that another member is asked to prove. */
typedef struct DedupProof {
    uint32_t page;            /* the other member's page number */
    const void *content;      /* our copy, stable while the call lasts */
    bool proven;              /* out */
} DedupProof;

/* A segment that we want, and the proof that we may have it (I10). */
typedef struct DedupFetch {
    uint32_t gid;
    uint32_t page;            /* a page of the segment whose content we have */
    const void *content;      /* our copy of it, stable while the call lasts */
    int fd;                   /* out: unchecked; -1: nobody gave it */
} DedupFetch;

/* At most this many proofs or segments in one request. */
#define DEDUP_PEER_BATCH 128

/*
 * Make a group.  @dir NULL: this process only.  A directory is opened here,
 * made if only its last part is missing, and joined later.  NULL and
 * DEDUP_ERROR_GROUP if nobody can mean it: no directory, a symbolic link, the
 * root, a file system of the kernel's.  One that cannot be made or read, or
 * is not ours, is reported by dedup_group_join() instead: the VM must start
 * (I9).  Any thread.
 */
DedupGroup *dedup_group_new(const char *dir, GError **error);

/*
 * Join: find a live member and take the shared file from it, or make it;
 * take a slot; listen; start the peer thread.  Removes stale socket names.
 * The directory must belong to our effective uid or root and be writable by
 * its owner only.  It may take seconds, and looks for @ops->is_stopping().
 * False: DEDUP_ERROR_GROUP, or _MEMORY or _SYSTEM if the host lacks something;
 * call it again later, as after dedup_group_detach().  The caller's thread is
 * the scanner's from now on.
 */
bool dedup_group_join(DedupGroup *g, const DedupGroupOps *ops, void *opaque,
                      GError **error);

/*
 * Make us a member for all threads.  After a join the caller may have to name
 * its segments anew first: until then only the scanner's functions find the
 * group.
 */
void dedup_group_enter(DedupGroup *g);

/* Entered, and not detached since?  Any thread; atomic, takes no lock. */
bool dedup_group_is_joined(const DedupGroup *g);

/*
 * Is what we hold open still what the directory has?  False: somebody deleted
 * or replaced its files; whoever joins now does not find us.
 */
bool dedup_group_is_current(const DedupGroup *g);

/*
 * Let go of the directory, to join again.  dedup_group_is_joined() becomes
 * false first, under the lock: so no other thread is in the middle of
 * something, or begins.  Stops the peer thread.  The scanner's thread may only
 * join then.
 */
void dedup_group_detach(DedupGroup *g);

/*
 * Did the last join find the group that we were in, and us in it?  If not the
 * index is another one, segments have no names in it, and our number may be
 * another one.
 */
bool dedup_group_resumed(const DedupGroup *g);

/*
 * Leave and free; stops the peer thread, removes our socket's name.  Any
 * thread, and no other one calls anything any more.
 */
void dedup_group_free(DedupGroup *g);

/* Any thread. */
bool dedup_group_has_dir(const DedupGroup *g);
/* As of the last join.  The scanner's thread, or any one after its end. */
unsigned dedup_group_self(const DedupGroup *g);
uint64_t dedup_group_salt(const DedupGroup *g);
DedupIndex *dedup_group_index(const DedupGroup *g);
/* CPU time of the peer thread; any thread. */
uint64_t dedup_group_cpu_ns(const DedupGroup *g);
/* Memory of the shared file in bytes: what is allocated. */
uint64_t dedup_group_shared_bytes(const DedupGroup *g);

/*
 * Look which members live (an OFD lock each) and count those of other
 * versions.  Call once a pass, and after a peer did not answer.
 */
void dedup_group_refresh(DedupGroup *g);
/* Did it live when we last looked, or has it joined since? */
bool dedup_group_alive(DedupGroup *g, unsigned member);
/* Any thread; atomic. */
unsigned dedup_group_members(const DedupGroup *g);
/* As of the last refresh. */
unsigned dedup_group_members_incompatible(const DedupGroup *g);

/*
 * Tell the others about ourselves: our slot.  tell_reserved() changes only
 * @reserved_bytes of what was told last: that is *@bytes, which is atomic and
 * outlives the group, from then on.  False: not written; while we have not
 * joined, or have told nothing yet, it is only remembered.  Any thread.
 */
bool dedup_group_tell(DedupGroup *g, const DedupMemberInfo *info);
bool dedup_group_tell_reserved(DedupGroup *g, const uint64_t *bytes);

/*
 * What a member says about itself.  False: not alive, or its slot is not
 * written, or we have not joined.  Any thread.
 */
bool dedup_group_member(DedupGroup *g, unsigned member,
                        DedupMemberInfo *info);

/*
 * Does it only estimate?  Then nobody merges with it.  What it was is
 * remembered until the next refresh.
 */
bool dedup_group_estimates(DedupGroup *g, unsigned member);

/*
 * Calls @fn for each member that lives and has written its slot, this one
 * (@self) included; for none while we have not joined.  As
 * dedup_group_member(), but asks the kernel once for all.  Any thread.
 *
 * @fn is called with the group's lock held: it must not call what any thread
 * may call here but dedup_group_members() and dedup_group_is_joined(), nor
 * take a lock that comes before it.
 */
typedef void (*DedupMemberFn)(void *opaque, unsigned member, bool self,
                              const DedupMemberInfo *info);
void dedup_group_foreach_member(DedupGroup *g, DedupMemberFn fn,
                                void *opaque);

/*
 * The table of segments.  alloc: a free gid for a new segment of this member
 * (0: table full, or the table's lock is held by somebody who does not move;
 * try again later).  lookup: who published it and its length, if there is one
 * of that name.  release: nobody uses it any more; done by the publisher, or
 * by anyone if the publisher is gone.
 */
typedef enum DedupLookup {
    DEDUP_LOOKUP_GONE,        /* the gid is stale */
    DEDUP_LOOKUP_FOUND,
    DEDUP_LOOKUP_FAILED,      /* it cannot be told now */
} DedupLookup;

uint32_t dedup_group_segment_alloc(DedupGroup *g, unsigned npages);
DedupLookup dedup_group_segment_lookup(DedupGroup *g, uint32_t gid,
                                       unsigned *member, unsigned *npages);
void dedup_group_segment_release(DedupGroup *g, uint32_t gid);

/*
 * Who uses a segment.  tell and clear: we do (@use->gid), or do not any more;
 * false: not written, try again later.  others: the sum over all *other* live
 * members; @use->pages is the union, @use->mapped the sum (saturating).
 */
bool dedup_group_tell_use(DedupGroup *g, const DedupSegmentUse *use);
bool dedup_group_clear_use(DedupGroup *g, uint32_t gid);
void dedup_group_others_use(DedupGroup *g, uint32_t gid,
                            DedupSegmentUse *use);

/*
 * Walk all segments that exist (for the figures and for what becomes of
 * them): calls @fn with the segment's length, whether this member published
 * it, this member's usage as it was told, and that of all other live
 * members together.  @fn returns whether this member holds the segment, mapped
 * or not; no lock is held.  False: a part of the table could not be read, or
 * @ops->is_stopping said so: a large one takes a second and more.
 *
 * A segment that nobody maps is released when it is found so in two walks, if
 * its publisher is gone, or is this member and does not hold it any more.
 */
typedef bool (*DedupSegmentFn)(void *opaque, uint32_t gid, unsigned npages,
                               bool ours, const DedupSegmentUse *own,
                               const DedupSegmentUse *others);
bool dedup_group_foreach_segment(DedupGroup *g, DedupSegmentFn fn,
                                 void *opaque);

/*
 * Ask member @member to prove that it has the pages: peer.h tells how.  Sets
 * @proven of each.  False: it does not answer, or not in time.
 */
bool dedup_group_prove(DedupGroup *g, unsigned member, DedupProof *proofs,
                       unsigned n);

/*
 * Get the fds of @n segments from @member or, if it gives none, from any
 * other live user.  Whoever has the segment gives it to us only if @content
 * is the content of that page of it.  The fds are the caller's.
 */
void dedup_group_fetch(DedupGroup *g, unsigned member, DedupFetch *items,
                       unsigned n);

#endif /* DEDUP_GROUP_H */
