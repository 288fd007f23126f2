/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The locks of a group: a byte of the file "slots" for each member, which
 * holds it as long as it lives, and one for the table of segments.
 *
 * They are OFD locks on descriptions that each process opens itself, so the
 * kernel drops them when it dies, however it dies.
 *
 * Thread: any, unless group-internal.h says otherwise.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "group/group-internal.h"
#include "host/sys.h"

/* Behind all slots. */
#define TABLE_BYTE 4096

/* The table's lock is held for microseconds: 2 ms is long. */
#define TABLE_TRIES 40
#define TABLE_RETRY_US 50

int dedup_group_byte_lock(int fd, short type, off_t byte)
{
    struct flock lock = {
        .l_type = type,
        .l_whence = SEEK_SET,
        .l_start = byte,
        .l_len = 1,
    };

    return sys_fcntl_lock(fd, F_OFD_SETLK, &lock) < 0 ? errno : 0;
}

bool dedup_group_slot_locked(int slots_fd, unsigned member)
{
    struct flock lock = {
        .l_type = F_WRLCK,
        .l_whence = SEEK_SET,
        .l_start = member,
        .l_len = 1,
    };

    /* if that cannot be told nobody shall be taken for dead */
    return sys_fcntl_lock(slots_fd, F_OFD_GETLK, &lock) < 0 ||
           lock.l_type != F_UNLCK;
}

/*
 * The kernel names one lock of a range, whichever: so a range is split at it.
 * That takes two questions for each member, not one for each slot.
 */
static bool find_locks(int slots_fd, unsigned first, unsigned end,
                       bool *locked)
{
    while (first < end) {
        struct flock lock = {
            .l_type = F_WRLCK,
            .l_whence = SEEK_SET,
            .l_start = first,
            .l_len = end - first,
        };
        unsigned start, stop;

        if (sys_fcntl_lock(slots_fd, F_OFD_GETLK, &lock) < 0) {
            return false;
        }
        if (lock.l_type == F_UNLCK) {
            return true;
        }
        start = MAX(lock.l_start, first);
        stop = lock.l_len ? MIN(lock.l_start + lock.l_len, end) : end;
        for (unsigned k = start; k < stop; k++) {
            locked[k] = true;
        }
        if (!find_locks(slots_fd, first, start, locked)) {
            return false;
        }
        first = MAX(stop, start + 1);
    }
    return true;
}

bool dedup_group_locked_slots(int slots_fd, bool locked[DEDUP_MAX_MEMBERS])
{
    memset(locked, 0, DEDUP_MAX_MEMBERS * sizeof(locked[0]));
    return find_locks(slots_fd, 0, DEDUP_MAX_MEMBERS, locked);
}

bool dedup_group_table_lock(DedupGroup *g)
{
    if (g->slots_fd < 0) {
        return true;            /* nobody else is there */
    }
    /* There is no way to wait for such a lock with a time limit. */
    for (unsigned i = 0; i < TABLE_TRIES; i++) {
        if (dedup_group_byte_lock(g->slots_fd, F_WRLCK, TABLE_BYTE) == 0) {
            return true;
        }
        g_usleep(TABLE_RETRY_US);
    }
    return false;
}

void dedup_group_table_unlock(DedupGroup *g)
{
    if (g->slots_fd >= 0) {
        dedup_group_byte_lock(g->slots_fd, F_UNLCK, TABLE_BYTE);
    }
}
