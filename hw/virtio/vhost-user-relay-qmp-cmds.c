/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * query-vhost-user-relays: what relays have done
 */

#include "qemu/osdep.h"
#include "qapi/qapi-commands-vhost-user-relay.h"
#include "vhost-user-relay-internal.h"

static void add_figures(VhostUserRelayInfo *info, VhostUserRelay *relay)
{
    const VhostUserRelayPool *pool = &relay->pool;
    RelayQueue *rq;

    info->chardev = g_strdup(relay->chardev);
    if (relay->iothread) {
        info->iothread = iothread_get_id(relay->iothread);
    }
    info->size = relay->size;
    info->held = pool->area ? vhost_user_relay_area_held(pool->area) : 0;
    info->requests = stat64_get(&pool->requests);
    info->bytes_out = stat64_get(&pool->bytes_out);
    info->bytes_in = stat64_get(&pool->bytes_in);
    info->waits = stat64_get(&pool->waits);
    info->unpopped = stat64_get(&pool->unpopped);
    for (int i = 0; i < relay->queues->len; i++) {
        rq = vhost_user_relay_queue(relay, i);
        info->broken = info->broken || (rq && rq->started && rq->q.broken);
    }
}

VhostUserRelayInfoList *qmp_query_vhost_user_relays(Error **errp)
{
    VhostUserRelayInfoList *list = NULL;
    VhostUserRelay *relay;

    QLIST_FOREACH(relay, &vhost_user_relays, next) {
        VhostUserRelayInfo *info = g_new0(VhostUserRelayInfo, 1);

        add_figures(info, relay);
        QAPI_LIST_PREPEND(list, info);
    }
    return list;
}
