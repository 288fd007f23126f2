/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A host with a PCI device for VFIO, for a QEMU that is tested
 */

#ifndef VFIO_FAKE_H
#define VFIO_FAKE_H

/**
 * vfio_fake_start: from now on every QEMU that is started finds the device
 *
 * What QEMU asks VFIO is answered by a thread of this process, to which the
 * kernel passes the system calls on.  There is no way back: this process keeps
 * a filter of system calls and a mount namespace of its own.
 *
 * Returns: false if that is not possible here; the test is skipped then.
 */
bool vfio_fake_start(void);

/* What to give vfio-pci as its sysfsdev */
const char *vfio_fake_sysfsdev(void);

/* How many bytes of the guest's memory are mapped for DMA now */
uint64_t vfio_fake_mapped(void);

/* Before the test ends */
void vfio_fake_stop(void);

#endif /* VFIO_FAKE_H */
