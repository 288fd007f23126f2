/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A back end of vhost-user for tests: the protocol
 */

#include "qemu/osdep.h"
#include "qemu/memfd.h"
#include "vhost-user-backend.h"
#include <glib/gstdio.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#define VERSION 1
#define FLAG_REPLY 4
#define FLAG_NEED_REPLY 8
#define HEADER 12
#define NOFD 0x100

static void *backend_thread(void *opaque);

static void free_message(gpointer opaque)
{
    VubMessage *m = opaque;
    int i;

    for (i = 0; i < m->nfds; i++) {
        if (m->fds[i] >= 0) {
            close(m->fds[i]);
        }
    }
    g_free(m);
}

static void free_table(gpointer opaque)
{
    VubTable *t = opaque;
    unsigned i;

    for (i = 0; i < t->n; i++) {
        munmap(t->host[i] - t->regions[i].offset,
               t->regions[i].size + t->regions[i].offset);
    }
    g_free(t);
}

VubBackend *vub_new(void)
{
    VubBackend *b = g_new0(VubBackend, 1);
    int i;

    b->features = VUB_ALL_FEATURES;
    b->protocol_features = VUB_ALL_PROTOCOL;
    b->queues = VUB_MAX_QUEUES;
    b->sock = b->state_fd = -1;
    b->messages = g_ptr_array_new_with_free_func(free_message);
    b->tables = g_ptr_array_new_with_free_func(free_table);
    for (i = 0; i < VUB_MAX_QUEUES; i++) {
        b->starts[i] = g_ptr_array_new_with_free_func(g_free);
        b->vq[i].next.call = -1;
    }
    g_mutex_init(&b->lock);
    g_cond_init(&b->changed);
    return b;
}

void vub_start(VubBackend *b)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    b->dir = g_strdup("/tmp/vhost-user-XXXXXX");
    g_assert_nonnull(g_mkdtemp(b->dir));
    b->path = g_strdup_printf("%s/sock", b->dir);
    g_strlcpy(address.sun_path, b->path, sizeof(address.sun_path));
    b->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    g_assert_cmpint(bind(b->listener, (struct sockaddr *)&address,
                         sizeof(address)), ==, 0);
    g_assert_cmpint(listen(b->listener, 4), ==, 0);
    g_assert_true(g_unix_open_pipe(b->wake, FD_CLOEXEC, NULL));
    b->thread = g_thread_new("backend", backend_thread, b);
}

static void wake_thread(VubBackend *b)
{
    g_assert_cmpint(write(b->wake[1], "", 1), ==, 1);
}

void vub_free(VubBackend *b)
{
    int i;

    if (b->thread) {
        qatomic_set(&b->quit, true);
        wake_thread(b);
        g_thread_join(b->thread);
        close(b->listener);
        close(b->wake[0]);
        close(b->wake[1]);
        g_unlink(b->path);
        g_rmdir(b->dir);
    }
    g_ptr_array_unref(b->messages);
    g_ptr_array_unref(b->tables);
    for (i = 0; i < VUB_MAX_QUEUES; i++) {
        g_ptr_array_unref(b->starts[i]);
    }
    g_mutex_clear(&b->lock);
    g_cond_clear(&b->changed);
    g_free(b->path);
    g_free(b->dir);
    g_free(b);
}

static bool recv_all(int sock, void *buf, size_t len)
{
    return recv(sock, buf, len, MSG_WAITALL) == len;
}

/* The next message, or NULL if QEMU hung up. */
static VubMessage *receive(int sock)
{
    VubMessage *m = g_new0(VubMessage, 1);
    char control[CMSG_SPACE(VUB_MAX_FDS * sizeof(int))];
    struct iovec iov = { &m->request, HEADER };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *c;

    if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | MSG_WAITALL) != HEADER) {
        g_free(m);
        return NULL;
    }
    g_assert_false(msg.msg_flags & MSG_CTRUNC);
    for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            m->nfds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(m->fds, CMSG_DATA(c), m->nfds * sizeof(int));
        }
    }
    g_assert_cmpuint(m->flags & 3, ==, VERSION);
    g_assert_cmpuint(m->size, <=, VUB_PAYLOAD);
    if (m->size && !recv_all(sock, m->bytes, m->size)) {
        free_message(m);
        return NULL;
    }
    return m;
}

/* A peer that has gone hangs up at the next receive(). */
static void reply(VubBackend *b, const VubMessage *m, const void *payload,
                  uint32_t size)
{
    uint8_t buf[HEADER + VUB_PAYLOAD];
    uint32_t header[3] = { m->request, VERSION | FLAG_REPLY, size };

    memcpy(buf, header, HEADER);
    memcpy(buf + HEADER, payload, size);
    if (send(b->sock, buf, HEADER + size, MSG_NOSIGNAL) < 0) {
        g_test_message("reply to %u: %s", m->request, strerror(errno));
    }
}

static void reply_u64(VubBackend *b, const VubMessage *m, uint64_t value)
{
    reply(b, m, &value, sizeof(value));
}

/* The queue that a message is about, if it is about one. */
static unsigned queue_of(const VubMessage *m)
{
    unsigned q = m->request == VUB_SET_VRING_KICK ||
                 m->request == VUB_SET_VRING_CALL ? m->u64 & 0xff
                                                  : m->state.index;

    g_assert_cmpuint(q, <, VUB_MAX_QUEUES);
    return q;
}

static void map_table(VubBackend *b, const VubMessage *m)
{
    VubTable *t = g_new0(VubTable, 1);
    unsigned i;

    g_assert_cmpuint(m->table.n, <=, VUB_MAX_REGIONS);
    g_assert_cmpuint(m->table.n, ==, m->nfds);
    t->n = m->table.n;
    memcpy(t->regions, m->table.regions, t->n * sizeof(t->regions[0]));
    for (i = 0; i < t->n; i++) {
        VubRegion *r = &t->regions[i];
        uint8_t *p = mmap(NULL, r->size + r->offset, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_NORESERVE, m->fds[i], 0);

        g_assert_true(p != MAP_FAILED);
        t->host[i] = p + r->offset;
    }
    g_ptr_array_add(b->tables, t);
}

const VubTable *vub_table(VubBackend *b)
{
    const VubTable *t = NULL;

    g_mutex_lock(&b->lock);
    if (b->tables->len) {
        t = g_ptr_array_index(b->tables, b->tables->len - 1);
    }
    g_mutex_unlock(&b->lock);
    g_assert_nonnull(t);
    return t;
}

static void *at_user(const VubTable *t, uint64_t user, uint64_t len)
{
    unsigned i;

    for (i = 0; i < t->n; i++) {
        const VubRegion *r = &t->regions[i];

        if (user >= r->user && user - r->user <= r->size - len) {
            return t->host[i] + (user - r->user);
        }
    }
    g_error("ring at 0x%" PRIx64 " is not in the table", user);
}

static void set_addr(VubBackend *b, const VubMessage *m)
{
    VubRing *r = &b->vq[queue_of(m)].next;
    uint32_t num = r->num;

    g_assert_cmpuint(b->tables->len, >, 0);
    g_assert_cmpuint(num, >, 0);
    r->table = g_ptr_array_index(b->tables, b->tables->len - 1);
    r->desc = at_user(r->table, m->addr.desc, num * sizeof(*r->desc));
    r->avail = at_user(r->table, m->addr.avail, 6 + num * 2);
    r->used = at_user(r->table, m->addr.used, 6 + num * 8);
    g_assert_cmpuint((uintptr_t)r->desc % 16, ==, 0);
    g_assert_cmpuint((uintptr_t)r->avail % 2, ==, 0);
    g_assert_cmpuint((uintptr_t)r->used % 4, ==, 0);
}

static void start_ring(VubBackend *b, const VubMessage *m)
{
    unsigned q = queue_of(m);
    VubRing *r = g_new(VubRing, 1);

    *r = b->vq[q].next;
    g_assert_nonnull(r->desc);
    r->backend = b;
    r->queue = q;
    r->kick = m->u64 & NOFD ? -1 : m->fds[0];
    r->event_idx = b->acked_features & VUB_BIT(VIRTIO_RING_F_EVENT_IDX);
    r->last_avail = r->base;
    r->used_idx = r->used_start = le16_to_cpu(r->used->idx);
    g_ptr_array_add(b->starts[q], r);
    b->vq[q].now = r;
}

static void set_call(VubBackend *b, const VubMessage *m)
{
    unsigned q = queue_of(m);
    int fd = m->u64 & NOFD ? -1 : m->fds[0];

    b->vq[q].next.call = fd;
    if (b->vq[q].now) {
        qatomic_set(&b->vq[q].now->call, fd);
    }
}

static uint16_t stop_ring(VubBackend *b, unsigned q)
{
    VubRing *r = b->vq[q].now;

    if (!r) {
        return b->vq[q].next.base;
    }
    qatomic_set(&r->stopped, true);
    b->vq[q].now = NULL;
    if (b->gives_up) {
        return r->base + (uint16_t)(qatomic_read(&r->used_idx) -
                                    r->used_start);
    }
    return qatomic_read(&r->last_avail);
}

/* "Internal state": QEMU reads it from the pipe that it sent, or writes it. */
static uint64_t set_state_fd(VubBackend *b, VubMessage *m)
{
    uint32_t direction = m->state.index;

    g_assert_cmpint(m->nfds, ==, 1);
    if (direction == 0) {
        g_assert_cmpint(write(m->fds[0], b->state, sizeof(b->state)), ==,
                        sizeof(b->state));
        close(m->fds[0]);
    } else {
        b->state_fd = m->fds[0];
    }
    m->fds[0] = -1;
    return NOFD;
}

static uint64_t check_state(VubBackend *b)
{
    ssize_t n = 0, got;

    if (b->state_fd >= 0) {
        do {
            got = read(b->state_fd, b->state + n, sizeof(b->state) - n);
            n += MAX(got, 0);
        } while (got > 0 && n < sizeof(b->state));
        close(b->state_fd);
        b->state_fd = -1;
        return n != sizeof(b->state);
    }
    return 0;
}

/* What a message changes here.  True: it has no answer of its own. */
static bool handle(VubBackend *b, VubMessage *m)
{
    VubMessage answer = *m;

    switch (m->request) {
    case VUB_GET_FEATURES:
        reply_u64(b, m, b->features);
        return false;
    case VUB_GET_PROTOCOL_FEATURES:
        reply_u64(b, m, b->protocol_features);
        return false;
    case VUB_GET_QUEUE_NUM:
        reply_u64(b, m, b->queues);
        return false;
    case VUB_GET_STATUS:
        reply_u64(b, m, b->status);
        return false;
    case VUB_GET_MAX_MEM_SLOTS:
        reply_u64(b, m, VUB_MAX_REGIONS);
        return false;
    case VUB_SET_DEVICE_STATE_FD:
        reply_u64(b, m, set_state_fd(b, m));
        return false;
    case VUB_CHECK_DEVICE_STATE:
        reply_u64(b, m, check_state(b));
        return false;
    case VUB_GET_CONFIG:
        g_assert_cmpuint(m->config.offset + m->config.size, <=,
                         sizeof(b->config));
        memcpy(answer.config.data, b->config + m->config.offset,
               m->config.size);
        reply(b, m, answer.bytes, m->size);
        return false;
    case VUB_GET_VRING_BASE:
        answer.state.num = stop_ring(b, queue_of(m));
        reply(b, m, answer.bytes, m->size);
        return false;
    case VUB_SET_LOG_BASE:
        reply(b, m, NULL, 0);
        return false;
    case VUB_GET_INFLIGHT_FD:
    case VUB_POSTCOPY_ADVISE:
        g_error("message %u, which this back end does not know", m->request);
        break;
    case VUB_SET_FEATURES:
        b->acked_features = m->u64;
        break;
    case VUB_SET_PROTOCOL_FEATURES:
        b->acked_protocol = m->u64;
        break;
    case VUB_SET_STATUS:
        b->status = m->u64;
        break;
    case VUB_SET_MEM_TABLE:
        map_table(b, m);
        break;
    case VUB_SET_VRING_NUM:
        b->vq[queue_of(m)].next.num = m->state.num;
        break;
    case VUB_SET_VRING_BASE:
        b->vq[queue_of(m)].next.base = m->state.num;
        break;
    case VUB_SET_VRING_ADDR:
        set_addr(b, m);
        break;
    case VUB_SET_VRING_KICK:
        start_ring(b, m);
        break;
    case VUB_SET_VRING_CALL:
        set_call(b, m);
        break;
    case VUB_SET_VRING_ENABLE:
        b->vq[queue_of(m)].enabled = m->state.num;
        break;
    }
    return true;
}

static void hang_up(VubBackend *b)
{
    unsigned q;

    close(b->sock);
    b->sock = -1;
    b->acked_features = b->acked_protocol = 0;
    for (q = 0; q < VUB_MAX_QUEUES; q++) {
        stop_ring(b, q);
        b->vq[q].enabled = false;
        b->vq[q].next = (VubRing) { .call = -1 };
    }
    g_cond_broadcast(&b->changed);
}

static void serve(VubBackend *b)
{
    VubMessage *m = receive(b->sock);
    bool acknowledge;

    if (m && b->hook) {
        b->hook(b, m, b->opaque);
    }
    g_mutex_lock(&b->lock);
    if (m) {
        m->connection = b->connection;
        acknowledge = handle(b, m);
        if (acknowledge && (m->flags & FLAG_NEED_REPLY)) {
            reply_u64(b, m, 0);
        }
        g_ptr_array_add(b->messages, m);
        g_cond_broadcast(&b->changed);
    } else {
        hang_up(b);
    }
    g_mutex_unlock(&b->lock);
}

static void accept_one(VubBackend *b)
{
    int fd = accept4(b->listener, NULL, NULL, SOCK_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    g_mutex_lock(&b->lock);
    if (b->refuse) {
        close(fd);
    } else {
        b->sock = fd;
        b->connection++;
    }
    g_mutex_unlock(&b->lock);
}

static void *backend_thread(void *opaque)
{
    VubBackend *b = opaque;
    struct pollfd p[2] = {
        { .fd = b->wake[0], .events = POLLIN },
        { .events = POLLIN },
    };
    char c;

    while (!qatomic_read(&b->quit)) {
        p[1].fd = b->sock >= 0 ? b->sock : b->listener;
        if (poll(p, 2, -1) < 0) {
            continue;
        }
        if (p[0].revents) {
            g_assert_cmpint(read(b->wake[0], &c, 1), ==, 1);
        } else if (b->sock >= 0) {
            serve(b);
        } else {
            accept_one(b);
        }
    }
    if (b->sock >= 0) {
        close(b->sock);
    }
    return NULL;
}

static const VubMessage *find_locked(VubBackend *b, uint32_t request,
                                     unsigned n)
{
    unsigned i;

    for (i = 0; i < b->messages->len; i++) {
        const VubMessage *m = g_ptr_array_index(b->messages, i);

        if (m->request == request && n-- == 0) {
            return m;
        }
    }
    return NULL;
}

const VubMessage *vub_message(VubBackend *b, uint32_t request, unsigned n)
{
    const VubMessage *m;

    g_mutex_lock(&b->lock);
    m = find_locked(b, request, n);
    g_mutex_unlock(&b->lock);
    return m;
}

unsigned vub_count(VubBackend *b, uint32_t request)
{
    unsigned n = 0;

    while (vub_message(b, request, n)) {
        n++;
    }
    return n;
}

const VubMessage *vub_wait_message(VubBackend *b, uint32_t request,
                                   unsigned n)
{
    int64_t end = g_get_monotonic_time() + VUB_TIMEOUT_US;
    const VubMessage *m;

    g_mutex_lock(&b->lock);
    while (!(m = find_locked(b, request, n - 1))) {
        if (!g_cond_wait_until(&b->changed, &b->lock, end)) {
            g_error("message %u did not come %u times", request, n);
        }
    }
    g_mutex_unlock(&b->lock);
    return m;
}

unsigned vub_starts(VubBackend *b, unsigned q)
{
    unsigned n;

    g_mutex_lock(&b->lock);
    n = b->starts[q]->len;
    g_mutex_unlock(&b->lock);
    return n;
}

VubRing *vub_wait_ring(VubBackend *b, unsigned q, unsigned n)
{
    int64_t end = g_get_monotonic_time() + VUB_TIMEOUT_US;
    VubRing *r;

    g_mutex_lock(&b->lock);
    while (b->starts[q]->len < n) {
        if (!g_cond_wait_until(&b->changed, &b->lock, end)) {
            g_error("queue %u was not started %u times", q, n);
        }
    }
    r = g_ptr_array_index(b->starts[q], b->starts[q]->len - 1);
    g_mutex_unlock(&b->lock);
    return r;
}

bool vub_enabled(VubBackend *b, unsigned q)
{
    bool enabled;

    g_mutex_lock(&b->lock);
    enabled = b->vq[q].enabled;
    g_mutex_unlock(&b->lock);
    return enabled;
}

void vub_disconnect(VubBackend *b, bool refuse)
{
    g_mutex_lock(&b->lock);
    b->refuse = refuse;
    g_assert_cmpint(b->sock, >=, 0);
    shutdown(b->sock, SHUT_RDWR);
    while (b->sock >= 0) {
        g_cond_wait(&b->changed, &b->lock);
    }
    g_mutex_unlock(&b->lock);
}

void vub_accept(VubBackend *b)
{
    g_mutex_lock(&b->lock);
    b->refuse = false;
    g_mutex_unlock(&b->lock);
}
