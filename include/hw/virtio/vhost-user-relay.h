/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * vhost-user without shared memory: requests are relayed through a bounce area
 *
 * A vhost-user back end normally maps all guest RAM.  With a relay it maps one
 * memfd instead, which holds the rings and copies of what the guest's requests
 * consist of.  Guest RAM may be anonymous, the back end can touch nothing
 * outside its requests, and nobody but QEMU needs to know where the guest's
 * pages are.  The price is one copy each way and a hop through QEMU.
 *
 * What the guest negotiates is between it and QEMU's own virtqueues; the back
 * end sees split rings, few features, and one region of memory that never
 * changes.  docs/system/vhost-user-relay.rst is for users.
 *
 * A VhostUserRelay belongs to a VhostUserState: one per connection, whichever
 * number of struct vhost_dev there are.  All functions: BQL held, main thread
 * or a vCPU's.  The requests themselves are worked on in the relay's thread.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_H
#define HW_VIRTIO_VHOST_USER_RELAY_H

#include "hw/qdev-properties.h"
#include "hw/qdev-properties-system.h"
#include "qapi/qapi-types-common.h"
#include "system/iothread.h"

/* What the user has asked for. */
typedef struct VhostUserRelayConf {
    OnOffAuto mode;
    IOThread *iothread;       /* NULL: the main loop */
    uint64_t size;            /* of the bounce area in bytes, 0: the default */
    uint32_t drain_ms;        /* how long a stop waits, 0: by kind of device */
} VhostUserRelayConf;

/* The properties of a device that can have one. */
#define DEFINE_PROP_RELAY(_state, _field) \
    DEFINE_PROP_ON_OFF_AUTO("relay", _state, _field.mode, ON_OFF_AUTO_OFF)
#define DEFINE_PROP_RELAY_IOTHREAD(_state, _field) \
    DEFINE_PROP_LINK("iothread", _state, _field.iothread, TYPE_IOTHREAD, \
                     IOThread *)
#define DEFINE_PROP_RELAY_SIZE(_state, _field) \
    DEFINE_PROP_SIZE("relay-size", _state, _field.size, 0)
/* For tests, whose back ends never end what they have begun. */
#define DEFINE_PROP_RELAY_DRAIN(_state, _field) \
    DEFINE_PROP_UINT32("x-relay-drain-ms", _state, _field.drain_ms, 0)

typedef struct VhostUserRelay VhostUserRelay;
struct vhost_dev;
struct vhost_vring_addr;

/**
 * vhost_user_relay_new - a relay, if it is wanted
 * @relay: set to it, or to NULL if @conf does not want one
 * @conf: what the user has asked for
 * @chardev: the connection's name
 *
 * Returns: false with @errp set if @conf makes no sense.
 */
bool vhost_user_relay_new(VhostUserRelay **relay,
                          const VhostUserRelayConf *conf, const char *chardev,
                          Error **errp);
void vhost_user_relay_free(VhostUserRelay *relay);

/**
 * vhost_user_relay_connect - a back end has connected
 * @dev: the first one of the connection
 *
 * Makes an area that no earlier back end knows.
 */
bool vhost_user_relay_connect(VhostUserRelay *relay, struct vhost_dev *dev,
                              Error **errp);
/* @dev goes.  Nothing happens if there is another connection by now. */
void vhost_user_relay_disconnect(VhostUserRelay *relay, struct vhost_dev *dev);

/* Features: what a guest may be offered if the back end offers @features... */
uint64_t vhost_user_relay_guest_features(VhostUserRelay *relay,
                                         uint64_t features);
/* ... and what the back end is told when the guest has accepted @features. */
uint64_t vhost_user_relay_backend_features(VhostUserRelay *relay,
                                           uint64_t features);
uint64_t vhost_user_relay_protocol_features(uint64_t features);
/* Those of guest_features() that a device must not offer unasked. */
uint64_t vhost_user_relay_device_features(uint64_t features,
                                          uint64_t requested);

/**
 * vhost_user_relay_table - the back end's memory table
 * @gpa, @size: its only region, at offset 0 of the file @fd
 *
 * Returns: false if the back end has it already.
 */
bool vhost_user_relay_table(VhostUserRelay *relay, uint64_t *gpa,
                            uint64_t *size, int *fd);
/* It has it; or it has forgotten all, being reset. */
void vhost_user_relay_table_sent(VhostUserRelay *relay, bool sent);

/* @num: as the guest has it; becomes the number of descriptors of our ring. */
int vhost_user_relay_set_num(VhostUserRelay *relay, struct vhost_dev *dev,
                             int index, unsigned *num);
/**
 * vhost_user_relay_set_addr - a new ring; @addr becomes its addresses
 *
 * Returns: a negative errno value if the area has no room for it.
 */
int vhost_user_relay_set_addr(VhostUserRelay *relay, struct vhost_dev *dev,
                              struct vhost_vring_addr *addr);
/* The eventfd that kicks the back end; -1 if the queue has no ring. */
int vhost_user_relay_kick(VhostUserRelay *relay, int index);
/* The back end has all that it needs: the queue runs if it is enabled. */
void vhost_user_relay_started(VhostUserRelay *relay, int index);
/* How the guest is to be told: an eventfd, or -1. */
void vhost_user_relay_set_call(VhostUserRelay *relay, int index, int fd);
/*
 * The eventfd by which the back end tells us; -1 if it has it already, unless
 * it is to have it @again.
 */
int vhost_user_relay_call(VhostUserRelay *relay, int index, bool again);
void vhost_user_relay_set_enable(VhostUserRelay *relay, int index,
                                 bool enable);
/* Has it a ring? */
bool vhost_user_relay_has_started(VhostUserRelay *relay, int index);
/**
 * vhost_user_relay_drain - let the back end finish before it is told to stop
 *
 * Takes no more from the guest.  With the BQL held, as a stop is: half a minute
 * at most for a disk, seconds for a file system, not at all for others.
 */
void vhost_user_relay_drain(VhostUserRelay *relay, struct vhost_dev *dev,
                            int index);
/**
 * vhost_user_relay_stop - end a queue
 * @taken: what the back end has answered to GET_VRING_BASE, or -1
 *
 * Returns: the guest's last_avail_idx.
 */
unsigned vhost_user_relay_stop(VhostUserRelay *relay, struct vhost_dev *dev,
                               int index, int taken);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_H */
