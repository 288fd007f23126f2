/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A back end of vhost-user for tests, which does what the test says
 *
 * A thread listens on a socket, answers QEMU and keeps every message with its
 * descriptors.  The rings belong to the test: it takes requests and completes
 * them when and how it likes, rightly or wrongly, also after QEMU has taken
 * the ring away.  Nothing that was mapped is unmapped before the end.
 */

#ifndef VHOST_USER_BACKEND_H
#define VHOST_USER_BACKEND_H

#include "hw/virtio/vhost-user.h"
#include "standard-headers/linux/virtio_ring.h"

#define VUB_TIMEOUT_US (180 * G_USEC_PER_SEC)
#define VUB_MAX_FDS 8
#define VUB_MAX_REGIONS 8
#define VUB_MAX_QUEUES 64
#define VUB_PAYLOAD 4096

#define VUB_F_PROTOCOL_FEATURES 30
#define VUB_F_LOG_ALL 26

enum {
    VUB_GET_FEATURES = 1,
    VUB_SET_FEATURES = 2,
    VUB_SET_MEM_TABLE = 5,
    VUB_SET_LOG_BASE = 6,
    VUB_SET_VRING_NUM = 8,
    VUB_SET_VRING_ADDR = 9,
    VUB_SET_VRING_BASE = 10,
    VUB_GET_VRING_BASE = 11,
    VUB_SET_VRING_KICK = 12,
    VUB_SET_VRING_CALL = 13,
    VUB_SET_VRING_ERR = 14,
    VUB_GET_PROTOCOL_FEATURES = 15,
    VUB_SET_PROTOCOL_FEATURES = 16,
    VUB_GET_QUEUE_NUM = 17,
    VUB_SET_VRING_ENABLE = 18,
    VUB_IOTLB_MSG = 22,
    VUB_GET_CONFIG = 24,
    VUB_POSTCOPY_ADVISE = 28,
    VUB_GET_INFLIGHT_FD = 31,
    VUB_SET_INFLIGHT_FD = 32,
    VUB_GET_MAX_MEM_SLOTS = 36,
    VUB_ADD_MEM_REG = 37,
    VUB_REM_MEM_REG = 38,
    VUB_SET_STATUS = 39,
    VUB_GET_STATUS = 40,
    VUB_SET_DEVICE_STATE_FD = 42,
    VUB_CHECK_DEVICE_STATE = 43,
    VUB_MAX,
};

typedef struct VubRegion {
    uint64_t gpa, size, user, offset;
} VubRegion;

/* What QEMU sent.  @fds stay open. */
typedef struct VubMessage {
    uint32_t request, flags, size;
    union {
        uint64_t u64;
        struct {
            uint32_t index, num;
        } state;
        struct {
            uint32_t index, flags;
            uint64_t desc, used, avail, log;
        } addr;
        struct {
            uint32_t n, padding;
            VubRegion regions[VUB_MAX_REGIONS];
        } table;
        struct {
            uint32_t offset, size, flags;
            uint8_t data[256];
        } config;
        struct {
            uint64_t size, offset;
            uint16_t queues, queue_size;
        } inflight;
        uint8_t bytes[VUB_PAYLOAD];
    };
    int fds[VUB_MAX_FDS];
    int nfds;
    unsigned connection;         /* 1: the first */
} VubMessage;

typedef struct VubTable {
    unsigned n;
    VubRegion regions[VUB_MAX_REGIONS];
    uint8_t *host[VUB_MAX_REGIONS];
} VubTable;

typedef struct VubBackend VubBackend;

/* A ring from its start to GET_VRING_BASE and, for the test, beyond. */
typedef struct VubRing {
    VubBackend *backend;
    const VubTable *table;
    unsigned queue;
    uint32_t num, base;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    int kick, call;
    bool event_idx;
    bool stopped;                /* by GET_VRING_BASE, or disconnected */
    uint16_t last_avail, used_idx;
    uint16_t used_start;
} VubRing;

typedef struct VubSegment {
    uint64_t gpa;
    uint32_t len;
    uint8_t *host;
} VubSegment;

/* A request as a device finds it: first what it reads, then what it writes. */
typedef struct VubRequest {
    VubRing *ring;
    uint16_t head;
    bool indirect;
    unsigned nout, nin;
    VubSegment *seg;             /* nout + nin */
    size_t out_len, in_len;
} VubRequest;

/* Called on the back end's thread, before it answers. */
typedef void VubHook(VubBackend *b, const VubMessage *m, void *opaque);

struct VubBackend {
    /* To be set before QEMU connects. */
    uint64_t features, protocol_features;
    unsigned queues;
    uint8_t config[256];
    /*
     * GET_VRING_BASE is answered with what was completed rather than with what
     * was taken: what is in flight is given up.
     */
    bool gives_up;
    VubHook *hook;
    void *opaque;

    char *dir, *path;
    /* The rest: under @lock. */
    GMutex lock;
    GCond changed;
    GPtrArray *messages;         /* VubMessage */
    GPtrArray *tables;           /* VubTable, the last one is in force */
    GPtrArray *starts[VUB_MAX_QUEUES]; /* VubRing, the last one runs */
    struct {
        VubRing next;            /* what is known before the start */
        VubRing *now;            /* that runs, or NULL */
        bool enabled;
    } vq[VUB_MAX_QUEUES];
    uint64_t acked_features, acked_protocol;
    uint64_t status;
    uint8_t state[64];           /* "internal state" of a migration */
    int state_fd;
    unsigned connection;
    bool refuse;                 /* do not accept a connection */
    int sock, listener, wake[2];
    bool quit;
    GThread *thread;
};

#define VUB_BIT(bit) (1ULL << (bit))
/* What a back end offers that can do everything, for a device of any kind. */
#define VUB_ALL_FEATURES \
    (VUB_BIT(32) | VUB_BIT(28) | VUB_BIT(29) | VUB_BIT(33) | VUB_BIT(34) | \
     VUB_BIT(35) | VUB_BIT(38) | VUB_BIT(VUB_F_LOG_ALL) | \
     VUB_BIT(VUB_F_PROTOCOL_FEATURES))
#define VUB_PLAIN_FEATURES \
    (VUB_BIT(32) | VUB_BIT(28) | VUB_BIT(29) | VUB_BIT(VUB_F_LOG_ALL) | \
     VUB_BIT(VUB_F_PROTOCOL_FEATURES))
#define VUB_PLAIN_PROTOCOL \
    (VUB_BIT(VHOST_USER_PROTOCOL_F_MQ) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_REPLY_ACK) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_LOG_SHMFD))
#define VUB_ALL_PROTOCOL \
    (VUB_PLAIN_PROTOCOL | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_PAGEFAULT) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_HOST_NOTIFIER) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_STATUS) | \
     VUB_BIT(VHOST_USER_PROTOCOL_F_DEVICE_STATE))

VubBackend *vub_new(void);
/* Listen; b->path is where. */
void vub_start(VubBackend *b);
void vub_free(VubBackend *b);

/* How many messages of this kind came. */
unsigned vub_count(VubBackend *b, uint32_t request);
/* The n-th of them (0: the first), or NULL.  It stays. */
const VubMessage *vub_message(VubBackend *b, uint32_t request, unsigned n);
/* Wait until there are @n. */
const VubMessage *vub_wait_message(VubBackend *b, uint32_t request,
                                   unsigned n);
/* Wait until queue @q was started @n times; the ring of the last start. */
VubRing *vub_wait_ring(VubBackend *b, unsigned q, unsigned n);
unsigned vub_starts(VubBackend *b, unsigned q);
bool vub_enabled(VubBackend *b, unsigned q);
/* Hang up.  Accept no other connection until told if @refuse. */
void vub_disconnect(VubBackend *b, bool refuse);
void vub_accept(VubBackend *b);
/* The table in force. */
const VubTable *vub_table(VubBackend *b);

/* Where [gpa, gpa + len) is, or NULL if it is not in one region. */
uint8_t *vub_at(const VubTable *t, uint64_t gpa, uint64_t len);

/* Wait for the next request.  NULL if none is there within the time. */
VubRequest *vub_pop(VubRing *r);
VubRequest *vub_pop_timeout(VubRing *r, int64_t timeout_us);
/* The same without waiting. */
VubRequest *vub_try_pop(VubRing *r);
void vub_request_free(VubRequest *req);
/* What the driver sent: @len bytes from @offset of the out-part. */
void vub_read(const VubRequest *req, size_t offset, void *buf, size_t len);
void vub_write(const VubRequest *req, size_t offset, const void *buf,
               size_t len);
void vub_fill(const VubRequest *req, size_t offset, int byte, size_t len);
/* The bytes that are in the in-part now. */
void vub_peek(const VubRequest *req, size_t offset, void *buf, size_t len);
/* Complete: a used entry and, unless the driver wants none, a call. */
void vub_complete(VubRequest *req, uint32_t len);
/* The parts of that, for any id. */
void vub_add_used(VubRing *r, uint32_t id, uint32_t len);
void vub_set_used_idx(VubRing *r, uint16_t idx);
void vub_call(VubRing *r);
/* Complete, free. */
void vub_done(VubRequest *req, uint32_t len);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(VubRequest, vub_request_free)

#endif /* VHOST_USER_BACKEND_H */
