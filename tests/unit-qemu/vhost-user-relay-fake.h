/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest and a back end for tests of the relay's queues
 *
 * What of QEMU the queues call is a fake here: the guest's memory is an array,
 * its virtqueues are what a test offers, and they check the rules of
 * hw/virtio/virtio.c as they go: nothing is pushed that was not popped, or
 * twice, or (if the guest wants order) before its turn.  The back end reads
 * the ring as VIRTIO 1.x lays it out, and it may write all over the area.
 *
 * Everything runs on the main thread.
 */

#ifndef VHOST_USER_RELAY_FAKE_H
#define VHOST_USER_RELAY_FAKE_H

#include "hw/virtio/virtio.h"
#include "../../hw/virtio/vhost-user-relay-queue.h"

#define FAKE_QUEUES 4
#define FAKE_PAGE VHOST_USER_RELAY_PAGE

/* Guest RAM.  The queues' avail rings come first, a page each. */
#define FAKE_RAM 0x100000u
#define FAKE_RAM_BYTES (4u << 20)
#define FAKE_DATA (FAKE_RAM + 16 * FAKE_PAGE)

/* A request of the guest, named by its head. */
typedef struct FakeRequest {
    unsigned n_out, n_in;
    struct {
        hwaddr addr;
        uint32_t len;
    } part[VHOST_USER_RELAY_DESCS_MAX];      /* the n_out first */
} FakeRequest;

/* What the guest finds in its used ring. */
typedef struct FakeUsed {
    unsigned head;
    uint32_t len;
} FakeUsed;

struct VirtQueue {
    unsigned index;
    unsigned num;
    FakeRequest **table;            /* of num, by head */
    uint16_t avail_idx;             /* that the guest has offered */
    uint16_t last_avail_idx;
    unsigned inuse;
    GArray *popped;                 /* of unsigned: heads, not pushed yet */
    GArray *filled, *used;          /* of FakeUsed */
    EventNotifier host, guest;
    bool notification;
    unsigned interrupts;
};

/* A request as the back end finds it. */
typedef struct FakeChain {
    uint16_t head;
    bool table;                     /* it came in one */
    unsigned n;
    struct {
        uint8_t *ptr;
        uint32_t len;
        bool write;
    } part[VHOST_USER_RELAY_DESCS_MAX];
} FakeChain;

typedef struct FakeBackend {
    bool started;
    unsigned num;
    uint16_t avail_idx, used_idx;
} FakeBackend;

typedef struct Fake {
    VirtIODevice *vdev;
    AddressSpace as;
    uint8_t *ram;
    hwaddr hole;                    /* this page cannot be read; 0: none */
    bool read_only;                 /* nor any be written */
    hwaddr moved;                   /* so far the guest moved its rings */
    unsigned maps;                  /* not unmapped yet */
    unsigned errors;
    char *error;                    /* the last that virtio_error() was told */
    VirtQueue vq[FAKE_QUEUES];
    VhostUserRelayPool pool;
    VhostUserRelayQueue q[FAKE_QUEUES];
    FakeBackend be[FAKE_QUEUES];
    /* Called in place of the clock; microseconds. */
    int64_t (*clock)(void);
} Fake;

extern Fake fake;

/* Once, first of all. */
void fake_main(int *argc, char ***argv);

/* @id: VIRTIO_ID_...; @features: the guest's */
void fake_new(uint64_t area_bytes, uint16_t id, uint64_t features);
/* All queues were stopped.  Nothing may be left mapped or referenced. */
void fake_free(void);

/* A ring of @num for the guest, and one like it for the back end. */
void fake_start(unsigned i, unsigned num, uint64_t features);
void fake_stop(unsigned i, int taken);
void fake_drain(unsigned i, int64_t limit_ms);
/* The guest begins anew, with its index at @idx. */
void fake_reset(unsigned i, unsigned num, uint16_t idx);
/* Below @n.  The same ones again after the same seed. */
uint32_t fake_random(uint32_t n);
void fake_seed(uint64_t seed);
/* From now on they are taken from @data, two bytes each, to its end. */
void fake_feed(const uint8_t *data, size_t size);
bool fake_is_fed(void);
/* Call what is scheduled for the main loop. */
void fake_main_loop(void);

/* The guest */

uint8_t *fake_ram(hwaddr addr);
bool fake_in_ram(hwaddr addr, hwaddr len);
/* A request without parts of head @head; they are added, and it is offered. */
FakeRequest *fake_request(unsigned i, unsigned head);
void fake_out(FakeRequest *r, hwaddr addr, uint32_t len);
void fake_in(FakeRequest *r, hwaddr addr, uint32_t len);
void fake_offer(unsigned i, unsigned head);
/* What is in slot @idx of its avail ring. */
unsigned fake_avail(unsigned i, uint16_t idx);
/* The @nth that came back, in all. */
FakeUsed fake_used(unsigned i, unsigned nth);
unsigned fake_n_used(unsigned i);

/* The back end */

/* The next request.  False if there is none. */
bool fake_get(unsigned i, FakeChain *chain);
void fake_use(unsigned i, uint32_t id, uint32_t len);
void fake_set_used_idx(unsigned i, uint16_t idx);
/* Fill @len bytes of what it may write, the first first. */
void fake_write(const FakeChain *chain, uint8_t byte, uint64_t len);
/* Random bytes all over the area, but for how far each queue has come. */
void fake_scribble(void);
/* Pages of the area that are in no run. */
unsigned fake_free_pages(void);

#endif /* VHOST_USER_RELAY_FAKE_H */
