/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One set of sources for several versions of QEMU
 *
 * What QEMU has named or placed differently over time, under one name.  What
 * differs within QEMU's own files is the business of the patches.  Take a
 * line out when no version that has patches needs it any more.
 */

#ifndef HW_DEDUP_QEMU_COMPAT_H
#define HW_DEDUP_QEMU_COMPAT_H

#include "qom/object.h"

#if /* since 10.1 */ \
    __has_include("system/ramblock.h")

#include "system/address-spaces.h"
#include "system/memory.h"
#include "system/ramblock.h"

/* What TypeInfo.class_init is given beside the class */
typedef const void QemuClassData;

#else

#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "exec/ramblock.h"

typedef void QemuClassData;

#endif

#if /* since 10.2 */ \
    __has_include("hw/virtio/virtio-features.h")
/* One function that knows whether it is called from an iothread */
#define virtio_notify_irqfd virtio_notify
#endif

#endif /* HW_DEDUP_QEMU_COMPAT_H */
