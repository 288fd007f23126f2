/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of the group share.  From the top down, and none calls one
 * above it: group-ask.c (asking members), group-table.c (segments and their
 * use), group.c (who lives, and what they say), group-join.c (joining and
 * leaving a directory), group-dir.c (the directory), group-file.c (the shared
 * file).  Below them are the sockets (peer.h).
 */

#ifndef DEDUP_GROUP_INTERNAL_H
#define DEDUP_GROUP_INTERNAL_H

#include <sys/un.h>

#include "group/group.h"
#include "group/peer.h"

/* In the group's directory: one for each protocol version and page size */
#define DEDUP_GROUP_SUBDIR "v1-4k"
/* In it: where a member listens */
#define DEDUP_GROUP_SOCKET "m%u.sock"

/*
 * The shared file, all offsets in bytes:
 *   header     one page: DedupFileHeader, and the index's header behind it
 *   slots      DEDUP_MAX_MEMBERS of DedupSlot
 *   table      DEDUP_MAX_SEGMENTS of DedupTableEntry
 *   use        a row of DEDUP_MAX_SEGMENTS DedupSegmentUse for each member
 *   index      dedup_index_table_size()
 * It has its full size from the start and is sparse.
 */
#define DEDUP_FILE_MAGIC 0x717564656475ull
#define DEDUP_FILE_VERSION 1
#define DEDUP_FILE_INDEX_HEADER 1024
#define DEDUP_FILE_SLOTS DEDUP_PAGE_SIZE
#define DEDUP_FILE_TABLE \
    (DEDUP_FILE_SLOTS + DEDUP_MAX_MEMBERS * sizeof(DedupSlot))
#define DEDUP_FILE_USE \
    (DEDUP_FILE_TABLE + DEDUP_MAX_SEGMENTS * sizeof(DedupTableEntry))
#define DEDUP_FILE_ROW (DEDUP_MAX_SEGMENTS * sizeof(DedupSegmentUse))
#define DEDUP_FILE_INDEX \
    (DEDUP_FILE_USE + DEDUP_MAX_MEMBERS * DEDUP_FILE_ROW)

typedef struct DedupFileHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t page_size;
    uint64_t salt;
    uint32_t segments;          /* entries of the table ever used; grows */
    uint32_t spare;
} DedupFileHeader;

typedef struct DedupSlot {
    uint64_t incarnation;       /* random, of this taking of the slot */
    uint32_t rows;              /* entries of the use row ever written */
    uint32_t written;           /* @info is valid */
    DedupMemberInfo info;
    uint8_t spare[128 - 16 - sizeof(DedupMemberInfo)];
} DedupSlot;

/*
 * An entry of the table of segments.  A gid is the number of its entry and a
 * generation that changes with each use of the entry; 0 is never a gid.
 */
typedef struct DedupTableEntry {
    uint32_t gid;               /* of the last use, kept when it is free */
    uint16_t npages;            /* 0: free */
    uint8_t member;             /* the publisher */
    uint8_t spare;
    uint64_t incarnation;       /* of the publisher */
} DedupTableEntry;

#define DEDUP_GID_SLOT(gid) ((gid) & (DEDUP_MAX_SEGMENTS - 1))

typedef struct DedupGroupFile {
    int fd;
    DedupFileHeader *header;    /* mapped: one page */
    void *table;                /* mapped: the index's table */
    DedupIndex *index;
    uint64_t salt;
} DedupGroupFile;

/* Entries of the table that are read at a time. */
#define DEDUP_WALK_ENTRIES 1024u

/*
 * What a walk over the table needs.  It is there from the start: a process at
 * its limit of mappings may get no memory of this size any more, and malloc()'s
 * failure is the end of it.
 */
typedef struct DedupTableWalk {
    DedupTableEntry entries[DEDUP_WALK_ENTRIES];
    DedupSegmentUse row[DEDUP_WALK_ENTRIES];
    DedupSegmentUse sum[DEDUP_WALK_ENTRIES];
    DedupSegmentUse own[DEDUP_WALK_ENTRIES];
    DedupSlot slots[DEDUP_MAX_MEMBERS];
    GArray *orphans;          /* gids without user and publisher, sorted */
    bool (*is_stopping)(void *opaque); /* as whoever joined said, or NULL */
    void *opaque;
} DedupTableWalk;

struct DedupGroup {
    /* The directory; without one @path is NULL and the fds are -1. */
    char *path;
    int dirfd;                  /* O_PATH, opened by dedup_group_new() */
    int open_errno;             /* why not, 0 otherwise */
    int subfd;                  /* DIR/v1-4k */
    int slots_fd;               /* our locks: the slot, the table */

    /*
     * Guards what threads other than the scanner's look at: what a join and a
     * detach change, which happens while @joined is false, and our slot.
     * Only the scanner changes all that, so it reads it without the lock.
     */
    GMutex lock;
    bool joined;                /* atomic; written under the lock */
    struct {
        bool any;
        DedupMemberInfo info;   /* what was told last */
        const uint64_t *reserved; /* atomic: what is reserved; or NULL */
    } told;                     /* under the lock */
    GThread *scanner;           /* who joined first; NULL: nobody yet */

    DedupGroupFile file;
    bool has_slot;              /* of the directory: to be given back */
    unsigned self;
    uint64_t incarnation;
    ino_t socket_ino;           /* of its name, as we made it */
    DedupPeerServer *server;
    uint64_t cpu_ns;            /* of all servers; atomic, read by anyone */

    /*
     * What we were before our files went (dedup_group_detach()): if we find
     * the same group again, or nobody, we are that again.
     */
    struct {
        DedupGroupFile file;    /* fd -1: nothing */
        unsigned self;
        bool resumed;           /* the last join did that */
    } kept;

    bool alive[DEDUP_MAX_MEMBERS]; /* atomic, as any thread may find one */
    unsigned members;           /* of them; likewise */
    unsigned members_incompatible;

    struct {
        DedupPeer peer;
        bool skip;              /* did not answer; until the next refresh */
        bool used;              /* since the last refresh */
        unsigned asked;         /* likewise: how often, */
        int64_t waited_us;      /* and for how long */
        enum { DEDUP_ROLE_UNKNOWN, DEDUP_ROLE_MERGES, DEDUP_ROLE_ESTIMATES }
        role;                   /* as of the last refresh, or since */
    } client[DEDUP_MAX_MEMBERS];

    uint32_t rows;              /* of our slot; written under the lock */
    uint32_t free_hint;         /* where to look for a free table entry */
    DedupTableWalk *walk;       /* group-table.c */
};

/* The scanner's thread is here. */
static inline void dedup_group_assert_scanner(const DedupGroup *g)
{
    g_assert(g->scanner == g_thread_self());
}

/* group-file.c */
bool dedup_group_file_create(DedupGroupFile *f, GError **error);
/* Checks @fd and maps it; takes @fd in any case. */
bool dedup_group_file_accept(DedupGroupFile *f, int fd, GError **error);
void dedup_group_file_close(DedupGroupFile *f);
uint64_t dedup_group_file_size(void);
/* All of it, or false with errno set. */
bool dedup_group_file_read(const DedupGroupFile *f, void *data, size_t size,
                           uint64_t offset);
bool dedup_group_file_write(const DedupGroupFile *f, const void *data,
                            size_t size, uint64_t offset);
bool dedup_group_slot_read(const DedupGroup *g, unsigned member,
                           DedupSlot *slot);
/* Makes the slot @g->self ours: whatever its last owner left is gone. */
bool dedup_group_slot_clear(DedupGroup *g, GError **error);

/* group-table.c: does @member use @gid, by its own word? */
bool dedup_group_uses(const DedupGroup *g, unsigned member, uint32_t gid);

/* group-dir.c */
/*
 * Open the directory anew, and make it if it is missing.  False and @error if
 * nobody can mean that; other failures are in @open_errno.
 */
bool dedup_group_open_path(DedupGroup *g, GError **error);
/* Is a name in an open directory another file than @fd, or none? */
bool dedup_group_is_replaced(int dirfd, const char *name, int fd);
void dedup_group_socket_address(const DedupGroup *g,
                                struct sockaddr_un *addr);
/* The name is there: remember it; and later, is it still ours? */
void dedup_group_note_socket(DedupGroup *g);
bool dedup_group_is_socket(const DedupGroup *g);

/* group-locks.c */
/* Lock a byte of a file, or give it up; does not wait.  0 or errno. */
int dedup_group_byte_lock(int fd, short type, off_t byte);
/*
 * Which slots living processes hold; our own reads as free.  False and errno:
 * that cannot be told; those that are found are.
 */
bool dedup_group_locked_slots(int slots_fd, bool locked[DEDUP_MAX_MEMBERS]);
/* Does a living process hold the slot?  Our own reads as free. */
bool dedup_group_slot_locked(int slots_fd, unsigned member);
/* The lock of the table of segments; false: somebody else sits on it. */
bool dedup_group_table_lock(DedupGroup *g);
void dedup_group_table_unlock(DedupGroup *g);

/* group-join.c */
bool dedup_group_join_directory(DedupGroup *g, const DedupGroupOps *ops,
                                void *opaque, GError **error);
void dedup_group_leave_directory(DedupGroup *g);
/* Other versions' live members in the same directory. */
unsigned dedup_group_count_incompatible(const DedupGroup *g);

#endif /* DEDUP_GROUP_INTERNAL_H */
