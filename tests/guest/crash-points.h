/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Crash points: what the linker puts in front of what
 */

#ifndef TESTS_GUEST_CRASH_POINTS_H
#define TESTS_GUEST_CRASH_POINTS_H

#include "group/group-internal.h"
#include "group/peer.h"
#include "group/segment.h"
#include "index/index.h"
#include "space/holdings.h"
#include "space/punch.h"

extern typeof(dedup_builder_finish) __real_dedup_builder_finish;
extern typeof(dedup_builder_free) __real_dedup_builder_free;
extern typeof(dedup_group_table_lock) __real_dedup_group_table_lock;
extern typeof(dedup_group_table_unlock) __real_dedup_group_table_unlock;
extern typeof(dedup_holding_add) __real_dedup_holding_add;
extern typeof(dedup_index_replace) __real_dedup_index_replace;
extern typeof(dedup_message_send) __real_dedup_message_send;
extern typeof(dedup_peer_server_new) __real_dedup_peer_server_new;
extern typeof(dedup_punch_replaced) __real_dedup_punch_replaced;

#endif
