/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A driver of virtqueues for tests: split and packed, chains and tables
 *
 * It does what libqos's does not: packed rings, requests of many segments,
 * completion in any order, heads in the order that the test wants.
 */

#ifndef VRING_DRIVER_H
#define VRING_DRIVER_H

#include "libqos/virtio-pci.h"

#define DRV_TIMEOUT_US (180 * G_USEC_PER_SEC)
#define DRV_MAX 1024

/*
 * Where in guest RAM what of a queue lies.  Tests have their buffers from
 * DRV_DATA on.
 */
#define DRV_RINGS 0x100000
#define DRV_RING_SIZE 0x20000
#define DRV_MSIX 0x700000
#define DRV_TABLES 0x800000
#define DRV_TABLES_SIZE 0x400000
#define DRV_QUEUES 6
#define DRV_DATA 0x2000000

typedef struct DrvSegment {
    uint64_t addr;
    uint32_t len;
    bool write;                  /* by the device */
} DrvSegment;

typedef struct DrvQueue {
    QTestState *qts;
    QVirtioPCIDevice *dev;
    QVirtQueuePCI vq;            /* what libqos wants to know */
    unsigned index;
    uint16_t num;
    bool packed, event_idx;
    /* Added to each address that the device is given: behind a vIOMMU. */
    uint64_t iova;
    uint64_t desc, avail, used, tables;
    /* Take free heads from the end rather than from the start. */
    bool high_first;
    bool busy[DRV_MAX];          /* descriptor (split) or id (packed) */
    uint16_t chain[DRV_MAX];     /* head: how many descriptors it has */
    uint16_t next[DRV_MAX];      /* split: as in the ring */
    /* Split: free running.  Packed: slot. */
    uint16_t avail_idx, published, last_used;
    bool wrap, used_wrap;        /* packed */
    uint16_t pending[DRV_MAX];   /* split: added, not yet published */
    /* packed: the flags that publish, of the first one added */
    uint16_t first_slot, first_flags;
    unsigned unpublished;
} DrvQueue;

/* Set up queue @index of a device; @num 0: as large as it offers. */
void drv_setup(DrvQueue *q, QVirtioPCIDevice *dev, unsigned index,
               uint16_t num, uint64_t features, uint64_t iova);
/* Have an MSI-X vector; to be called after drv_setup() in any order. */
void drv_msix(DrvQueue *q, uint16_t entry);
void drv_msix_mask(DrvQueue *q, bool mask);
/* Was there an interrupt since the last call? */
bool drv_interrupted(DrvQueue *q);
void drv_wait_interrupt(DrvQueue *q);

/* The head of the next request that is added. */
uint16_t drv_next_head(const DrvQueue *q);
/* Add a request: a chain of descriptors, or a table.  Returns its head. */
uint16_t drv_add(DrvQueue *q, const DrvSegment *s, unsigned n, bool indirect);
/* Show what was added to the device; notify it if it wants to be. */
void drv_publish(DrvQueue *q);
void drv_notify(DrvQueue *q);
bool drv_wants_kick(DrvQueue *q, uint16_t old);
void drv_kick(DrvQueue *q);
/* Add, publish, notify. */
uint16_t drv_send(DrvQueue *q, const DrvSegment *s, unsigned n, bool indirect);

/*
 * Split rings, requests of one descriptor each: add those again that were
 * there before.  And skip @n used ones, which are these; for many requests.
 */
void drv_resend(DrvQueue *q, const uint16_t *heads, unsigned n);
void drv_skip_used(DrvQueue *q, const uint16_t *heads, unsigned n);

/* The next used one, if there is one. */
bool drv_get_used(DrvQueue *q, uint16_t *id, uint32_t *len);
void drv_wait_used(DrvQueue *q, uint16_t *id, uint32_t *len);
/* The next used one must be @id, with @len. */
void drv_expect_used(DrvQueue *q, uint16_t id, uint32_t len);
/* Nothing is used. */
void drv_expect_none(DrvQueue *q);

/* Say when an interrupt is wanted. */
void drv_no_interrupt(DrvQueue *q, bool none);
void drv_set_used_event(DrvQueue *q, uint16_t event);

#endif /* VRING_DRIVER_H */
