/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Joining the group, at the start and when its files were deleted; see
 * rejoin.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_REJOIN_H
#define DEDUP_REJOIN_H

#include "internal.h"

/* Join; what keeps us from it can be asked for (dedup_engine_group_error()). */
void dedup_join(DedupEngine *e, const DedupGroupOps *ops);

/*
 * Look, now and then, whether the group's files are still there.  If not the
 * engine has not joined any more, and says why.
 */
void dedup_watch_group(DedupEngine *e);

/*
 * Give names to the segments that have none, as many as can be had now: the
 * group's table may be full, or locked by somebody who was stopped.
 */
void dedup_name_segments(DedupEngine *e);

/*
 * All of the table was walked: what was not met under its name has none any
 * more.  Others release the names of a member that they take for dead.  True:
 * there are such segments.
 */
bool dedup_forget_lost_names(DedupEngine *e);

#endif /* DEDUP_REJOIN_H */
