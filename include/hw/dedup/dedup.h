/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The dedup-scanner object: merges equal pages of guest RAM, within a VM and
 * across the VMs of a group.  See docs/system/dedup.rst.
 *
 * What the rest of QEMU calls is in hw/dedup/ram-guard.h.
 */

#ifndef HW_DEDUP_DEDUP_H
#define HW_DEDUP_DEDUP_H

#include "qom/object.h"

#define TYPE_DEDUP_SCANNER "dedup-scanner"
OBJECT_DECLARE_SIMPLE_TYPE(DedupScanner, DEDUP_SCANNER)

#endif /* HW_DEDUP_DEDUP_H */
