/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The memory that a vhost-user back end sees instead of guest RAM: see
 * vhost-user-relay-area.h
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/memfd.h"
#include "vhost-user-relay-area.h"

struct VhostUserRelayArea {
    int fd;
    void *host;
    unsigned pages;
    unsigned long *used;      /* in a run */
    unsigned long *touched;
    unsigned n_used;
    unsigned n_touched;       /* written by its thread, read by any */
    unsigned peak;            /* most of n_used since the last shrink */
};

VhostUserRelayArea *vhost_user_relay_area_new(uint64_t size, Error **errp)
{
    VhostUserRelayArea *area;
    void *host;
    int fd;

    /* No other kind of file would do: a back end could make it shorter. */
    fd = qemu_memfd_create("vhost-user-relay", size, false, 0,
                           F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL, errp);
    if (fd < 0) {
        return NULL;
    }
    host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (host == MAP_FAILED) {
        error_setg_errno(errp, errno, "cannot map %" PRIu64 " bytes", size);
        close(fd);
        return NULL;
    }
    area = g_new0(VhostUserRelayArea, 1);
    area->fd = fd;
    area->host = host;
    area->pages = size / VHOST_USER_RELAY_PAGE;
    area->used = bitmap_new(area->pages);
    area->touched = bitmap_new(area->pages);
    return area;
}

void vhost_user_relay_area_free(VhostUserRelayArea *area)
{
    if (area) {
        qemu_memfd_free(area->host, vhost_user_relay_area_size(area),
                        area->fd);
        g_free(area->used);
        g_free(area->touched);
        g_free(area);
    }
}

int vhost_user_relay_area_fd(const VhostUserRelayArea *area)
{
    return area->fd;
}

uint64_t vhost_user_relay_area_size(const VhostUserRelayArea *area)
{
    return (uint64_t)area->pages * VHOST_USER_RELAY_PAGE;
}

void *vhost_user_relay_area_ptr(const VhostUserRelayArea *area, unsigned page)
{
    assert(page < area->pages);
    return area->host + (uint64_t)page * VHOST_USER_RELAY_PAGE;
}

uint64_t vhost_user_relay_area_gpa(unsigned page)
{
    return VHOST_USER_RELAY_GPA + (uint64_t)page * VHOST_USER_RELAY_PAGE;
}

static void touch(VhostUserRelayArea *area, unsigned first, unsigned pages)
{
    unsigned added = 0;

    for (unsigned i = first; i < first + pages; i++) {
        added += !test_and_set_bit(i, area->touched);
    }
    qatomic_set(&area->n_touched, area->n_touched + added);
}

bool vhost_user_relay_area_alloc(VhostUserRelayArea *area, unsigned pages,
                                 unsigned *first)
{
    unsigned long at;

    assert(pages);
    if (pages > area->pages - area->n_used) {
        return false;
    }
    at = bitmap_find_next_zero_area(area->used, area->pages, 0, pages, 0);
    if (at + pages > area->pages) {
        return false;
    }
    bitmap_set(area->used, at, pages);
    area->n_used += pages;
    area->peak = MAX(area->peak, area->n_used);
    touch(area, at, pages);
    *first = at;
    return true;
}

void vhost_user_relay_area_release(VhostUserRelayArea *area, unsigned first,
                                   unsigned pages)
{
    assert(find_next_zero_bit(area->used, area->pages, first) >=
           first + pages);
    bitmap_clear(area->used, first, pages);
    area->n_used -= pages;
}

/* The memory of free pages from @first on.  True if the host has it now. */
static bool punch(VhostUserRelayArea *area, unsigned first, unsigned pages)
{
    if (fallocate(area->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)first * VHOST_USER_RELAY_PAGE,
                  (off_t)pages * VHOST_USER_RELAY_PAGE) < 0) {
        return false;
    }
    bitmap_clear(area->touched, first, pages);
    qatomic_set(&area->n_touched, area->n_touched - pages);
    return true;
}

bool vhost_user_relay_area_shrink(VhostUserRelayArea *area)
{
    unsigned keep = MAX(area->peak, VHOST_USER_RELAY_IDLE_PAGES);
    unsigned end = area->pages, first;

    area->peak = area->n_used;
    while (end && area->n_touched > keep) {
        /* The highest run of pages that are touched and free. */
        while (end && (!test_bit(end - 1, area->touched) ||
                       test_bit(end - 1, area->used))) {
            end--;
        }
        for (first = end; first && area->n_touched - (end - first) > keep &&
             test_bit(first - 1, area->touched) &&
             !test_bit(first - 1, area->used);) {
            first--;
        }
        if (first < end && !punch(area, first, end - first)) {
            break;
        }
        end = first;
    }
    return area->n_touched > MAX(area->n_used, VHOST_USER_RELAY_IDLE_PAGES);
}

uint64_t vhost_user_relay_area_held(const VhostUserRelayArea *area)
{
    return (uint64_t)qatomic_read(&area->n_touched) * VHOST_USER_RELAY_PAGE;
}
