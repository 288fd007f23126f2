/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Spare memory for a window that has to put pages back: one page for each
 * that it may have dropped.
 *
 * The kernel may have no page to give at that moment, and a guest must not
 * wait for one.  So the pages are there before the first is dropped; they
 * are moved, not copied, and made anew before the next window.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_SPARE_H
#define DEDUP_SPARE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A window drops so many pages at a time, before they are replaced. */
#define DEDUP_SPARE_PAGES 64

/* NULL at first: nothing is mapped before it is needed. */
typedef struct DedupSpare {
    uint8_t *pages;           /* DEDUP_SPARE_PAGES of them */
    bool whole;               /* none was moved away */
} DedupSpare;

/* Have all pages there; not in a window.  False: there is no memory. */
bool dedup_spare_ready(DedupSpare *s);

/* A page that the caller may write to and have moved away. */
uint8_t *dedup_spare_take(DedupSpare *s, unsigned i);

/* Bytes of memory. */
size_t dedup_spare_size(const DedupSpare *s);

/* As at first. */
void dedup_spare_free(DedupSpare *s);

#endif /* DEDUP_SPARE_H */
