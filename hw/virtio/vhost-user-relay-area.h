/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The memory that a vhost-user back end sees instead of guest RAM
 *
 * One sealed memfd, mapped here and offered to the back end as the only region
 * of its memory table.  Rings and bounce buffers are runs of pages in it.
 *
 *   run       pages next to each other, given to one user
 *   touched   a page that may have memory: it was part of a run since it was
 *             last given back to the host
 *
 * What the area holds is the back end's to change at any time: whoever reads
 * from it must check, and never read back what he has written.
 *
 * A VhostUserRelayArea belongs to its relay and is used by one thread at a
 * time; vhost_user_relay_area_held() may be called on any.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_AREA_H
#define HW_VIRTIO_VHOST_USER_RELAY_AREA_H

/* Back ends do O_DIRECT: the alignment that they know of. */
#define VHOST_USER_RELAY_PAGE 4096u

/* Where the back end finds it in its "guest physical" addresses. */
#define VHOST_USER_RELAY_GPA (1ULL << 40)

/* An idle area holds no more than this: 1 MiB. */
#define VHOST_USER_RELAY_IDLE_PAGES 256u

#define VHOST_USER_RELAY_SIZE_MIN (1ULL << 20)
#define VHOST_USER_RELAY_SIZE_MAX (1ULL << 30)

typedef struct VhostUserRelayArea VhostUserRelayArea;

/**
 * vhost_user_relay_area_new - make an area; no page of it has memory yet
 * @size: bytes, a multiple of the host's page size
 *
 * Returns: NULL with @errp set if the memfd cannot be had.
 */
VhostUserRelayArea *vhost_user_relay_area_new(uint64_t size, Error **errp);
void vhost_user_relay_area_free(VhostUserRelayArea *area);

int vhost_user_relay_area_fd(const VhostUserRelayArea *area);
uint64_t vhost_user_relay_area_size(const VhostUserRelayArea *area);
/* Where page @page is in our address space, and in the back end's. */
void *vhost_user_relay_area_ptr(const VhostUserRelayArea *area, unsigned page);
uint64_t vhost_user_relay_area_gpa(unsigned page);

/**
 * vhost_user_relay_area_alloc - take a run of pages
 * @pages: how many; not 0
 * @first: the first of them
 *
 * The lowest that is free, so that what is touched stays small.  Contents are
 * whatever was there.
 *
 * Returns: false if there is no such run.
 */
bool vhost_user_relay_area_alloc(VhostUserRelayArea *area, unsigned pages,
                                 unsigned *first);
void vhost_user_relay_area_release(VhostUserRelayArea *area, unsigned first,
                                   unsigned pages);

/**
 * vhost_user_relay_area_shrink - give memory back that was not needed lately
 *
 * Free pages go, the highest first, until no more are touched than were in
 * runs at one time since the last call, or VHOST_USER_RELAY_IDLE_PAGES.
 *
 * Returns: true if another call, later, may give back more.
 */
bool vhost_user_relay_area_shrink(VhostUserRelayArea *area);

/* Bytes of pages that are touched.  Any thread. */
uint64_t vhost_user_relay_area_held(const VhostUserRelayArea *area);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_AREA_H */
