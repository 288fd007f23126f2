/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A machine with one vhost-user device, its driver and its back end
 *
 * All three belong to the test.  With RELAY_TEST_PLAIN in the environment the
 * device has no relay, and RAM is shared: whatever does not ask for a relay
 * must pass then, too, which shows that driver and back end are right.
 */

#ifndef RELAY_VM_H
#define RELAY_VM_H

#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "vhost-user-backend.h"
#include "vring-driver.h"
#include "standard-headers/linux/virtio_config.h"

#define RVM_PAGE 4096
#define RVM_GPA (1ULL << 40)
#define RVM_QUEUES DRV_QUEUES
#define RVM_SLOT 4

#define RVM_FS "vhost-user-fs-pci,tag=t"
#define RVM_BLK "vhost-user-blk-pci"

typedef struct RelayVm {
    /* What to start; rvm_init() has the defaults. */
    const char *device, *props;  /* props: ",name=value" */
    const char *relay;           /* the device's property, with its comma */
    const char *machine, *ram, *chardev, *more;
    bool net;                    /* device is netdev=n0's, relay= is there */
    unsigned nqueues;            /* that the driver sets up */
    uint16_t num;                /* their size, 0: as offered */
    uint64_t wanted;             /* features, of those offered */
    uint64_t iova;
    bool msix;

    QTestState *qts;
    VubBackend *b;
    QPCIBus *bus;
    QVirtioPCIDevice *dev;
    uint64_t features;           /* negotiated with the guest */
    DrvQueue q[RVM_QUEUES];
    char *dir, *errors;          /* where QEMU's stderr goes */
} RelayVm;

/* Is this the run without a relay?  Then skip what needs one. */
bool rvm_plain(void);
bool rvm_skip_plain(void);

void rvm_init(RelayVm *vm);
/* Start the back end and QEMU. */
void rvm_start(RelayVm *vm);
/* Find the device; negotiate and set up its queues. */
void rvm_drive(RelayVm *vm);
/* The same again, after a reset; and the reset alone. */
void rvm_drive_again(RelayVm *vm);
void rvm_reset(RelayVm *vm);
/* rvm_init() with a device, rvm_start(), rvm_drive(). */
void rvm_run(RelayVm *vm, const char *device, const char *props);
void rvm_quit(RelayVm *vm);
/* What QEMU said on stderr until now; to be freed. */
char *rvm_stderr(RelayVm *vm);
void rvm_wait_stderr(RelayVm *vm, const char *text);

/* The figures of the only relay. */
QDict *rvm_relay(RelayVm *vm);
int64_t rvm_relay_figure(RelayVm *vm, const char *name);

uint8_t rvm_status(RelayVm *vm);
void rvm_wait_needs_reset(RelayVm *vm);

/* The byte @i of a pattern that no other seed gives. */
uint8_t rvm_byte(unsigned seed, size_t i);
void rvm_pattern(uint8_t *buf, unsigned seed, size_t len);
void rvm_fill(RelayVm *vm, uint64_t addr, unsigned seed, size_t len);
void rvm_check(RelayVm *vm, uint64_t addr, unsigned seed, size_t len);
/* All are @byte. */
void rvm_check_byte(RelayVm *vm, uint64_t addr, int byte, size_t len);
/* The out-part of a request, or its in-part. */
void rvm_check_out(const VubRequest *req, size_t offset, unsigned seed,
                   size_t len);
void rvm_write_in(const VubRequest *req, size_t offset, unsigned seed,
                  size_t len);

/*
 * A small request with a number: 8 bytes out say it, 16 bytes in are to be
 * answered.  For tests of which request comes when.
 */
#define RVM_TAGS (DRV_DATA + 0x1000000)
uint16_t rvm_send_tag(RelayVm *vm, unsigned queue, uint64_t tag);
uint64_t rvm_tag(const VubRequest *req);
/* The back end's next request is @tag. */
VubRequest *rvm_expect_tag(VubRing *r, uint64_t tag);
/* Answer it; the guest must find the answer with rvm_check_answer(). */
void rvm_answer(VubRequest *req);
/* The driver's next used one is @head, and has the answer to @tag. */
void rvm_check_answer(RelayVm *vm, unsigned queue, uint16_t head,
                      uint64_t tag);

#endif /* RELAY_VM_H */
