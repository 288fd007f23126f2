/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A host with a PCI device for VFIO, for a QEMU that is tested
 *
 * The type 1 interface of <linux/vfio.h>: /dev/vfio/vfio and the group's file
 * are empty files, and the device's is a memfd that holds its configuration
 * space.  A filter hands VFIO's ioctls, and no others, to vfio_thread().
 * The device does nothing; memory that is mapped for it is only counted.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/vfio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "dedup-qtest.h"
#include "vfio-fake.h"

#define GROUP "7"
#define CONFIG_SIZE 256

static struct {
    int notify;             /* where the system calls arrive */
    int device;
    char *dir;              /* stands in the place of /dev */
    char *sysfsdev;
    uint64_t mapped;        /* atomic */
} fake;

static bool read_from(uint32_t pid, uint64_t addr, void *to, size_t size)
{
    struct iovec here = { to, size }, there = { (void *)addr, size };

    return process_vm_readv(pid, &here, 1, &there, 1, 0) == size;
}

static bool write_to(uint32_t pid, uint64_t addr, void *from, size_t size)
{
    struct iovec here = { from, size }, there = { (void *)addr, size };

    return process_vm_writev(pid, &here, 1, &there, 1, 0) == size;
}

/* The device's file, as a new one of the process that asks; or an error */
static int64_t give_device(uint64_t id)
{
    struct seccomp_notif_addfd add = {
        .id = id, .srcfd = fake.device, .newfd_flags = O_CLOEXEC,
    };
    int fd = ioctl(fake.notify, SECCOMP_IOCTL_NOTIF_ADDFD, &add);

    return fd < 0 ? -errno : fd;
}

/* What a structure in the memory of the process that asks is filled with */
static int64_t fill(const struct seccomp_notif *req)
{
    uint64_t at = req->data.args[2];
    union {
        struct vfio_group_status group;
        struct vfio_iommu_type1_info iommu;
        struct vfio_iommu_type1_dma_map map;
        struct vfio_iommu_type1_dma_unmap unmap;
        struct vfio_device_info device;
        struct vfio_region_info region;
        struct vfio_irq_info irq;
    } u;
    size_t size;

    /* Each begins with argsz, how much of it there is. */
    if (!read_from(req->pid, at, &u.group.argsz, sizeof(u.group.argsz))) {
        return -EFAULT;
    }
    size = MIN(u.group.argsz, sizeof(u));
    if (!read_from(req->pid, at, &u, size)) {
        return -EFAULT;
    }
    switch ((uint32_t)req->data.args[1]) {
    case VFIO_GROUP_GET_STATUS:
        u.group.flags = VFIO_GROUP_FLAGS_VIABLE;
        break;
    case VFIO_IOMMU_GET_INFO:
        u.iommu.flags = VFIO_IOMMU_INFO_PGSIZES;
        u.iommu.iova_pgsizes = DEDUP_PAGE;
        break;
    case VFIO_IOMMU_MAP_DMA:
        qatomic_add(&fake.mapped, u.map.size);
        break;
    case VFIO_IOMMU_UNMAP_DMA:
        if (u.unmap.flags & VFIO_DMA_UNMAP_FLAG_ALL) {
            return -EINVAL;
        }
        qatomic_sub(&fake.mapped, u.unmap.size);
        break;
    case VFIO_DEVICE_GET_INFO:
        u.device.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
        u.device.num_regions = VFIO_PCI_NUM_REGIONS;
        u.device.num_irqs = VFIO_PCI_NUM_IRQS;
        break;
    case VFIO_DEVICE_GET_REGION_INFO:
        u.region.flags = 0;
        u.region.size = u.region.offset = 0;
        if (u.region.index == VFIO_PCI_CONFIG_REGION_INDEX) {
            u.region.flags = VFIO_REGION_INFO_FLAG_READ |
                             VFIO_REGION_INFO_FLAG_WRITE;
            u.region.size = CONFIG_SIZE;
        }
        break;
    default:
        return -ENOTTY;
    }
    return write_to(req->pid, at, &u, size) ? 0 : -EFAULT;
}

/* The answer to an ioctl, -errno if it fails */
static int64_t answer(const struct seccomp_notif *req)
{
    switch ((uint32_t)req->data.args[1]) {
    case VFIO_GET_API_VERSION:
        return VFIO_API_VERSION;
    case VFIO_CHECK_EXTENSION:
        return req->data.args[2] == VFIO_TYPE1v2_IOMMU;
    case VFIO_SET_IOMMU:
        qatomic_set(&fake.mapped, 0);
        return 0;
    case VFIO_GROUP_SET_CONTAINER:
    case VFIO_GROUP_UNSET_CONTAINER:
    case VFIO_DEVICE_RESET:
        return 0;
    case VFIO_GROUP_GET_DEVICE_FD:
        return give_device(req->id);
    default:
        return fill(req);
    }
}

static void *vfio_thread(void *opaque)
{
    for (;;) {
        struct seccomp_notif req = {};
        struct seccomp_notif_resp resp = {};
        int64_t ret;

        if (ioctl(fake.notify, SECCOMP_IOCTL_NOTIF_RECV, &req) < 0) {
            continue;       /* killed while it asked */
        }
        ret = answer(&req);
        resp.id = req.id;
        if (ret < 0) {
            resp.error = ret;
        } else {
            resp.val = ret;
        }
        ioctl(fake.notify, SECCOMP_IOCTL_NOTIF_SEND, &resp);
    }
    return NULL;
}

static bool filter_ioctls(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                 offsetof(struct seccomp_data, args[1])),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~0xffu),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, VFIO_TYPE << 8, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { G_N_ELEMENTS(code), code };

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        return false;
    }
    fake.notify = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                          SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    return fake.notify >= 0;
}

/* The files, and the devices that QEMU needs beside them */
static bool make_files(void)
{
    g_autofree char *command = NULL;

    fake.dir = dedup_tmpdir("/tmp");
    fake.sysfsdev = g_strdup_printf("%s/0000:00:07.0", fake.dir);
    command = g_strdup_printf(
        "cd %s && mkdir vfio 0000:00:07.0 && touch vfio/vfio vfio/" GROUP
        " && ln -s /groups/" GROUP " 0000:00:07.0/iommu_group"
        " && cp -a /dev/null /dev/zero /dev/random /dev/urandom"
        " /dev/userfaultfd .", fake.dir);
    return system(command) == 0;
}

static void make_device(void)
{
    static uint8_t config[CONFIG_SIZE] = {
        0xf4, 0x1a, 0xf0, 0x10,     /* some vendor, some device */
        [0x0b] = 0xff,              /* of no class */
    };

    fake.device = memfd_create("vfio-device", MFD_CLOEXEC);
    g_assert_cmpint(write(fake.device, config, CONFIG_SIZE), ==, CONFIG_SIZE);
}

bool vfio_fake_start(void)
{
    pthread_t thread;

    if (fake.dir) {
        return true;
    }
    if (!make_files() || !filter_ioctls()) {
        g_test_skip("this host cannot be given a device");
        return false;
    }
    make_device();
    g_assert_cmpint(pthread_create(&thread, NULL, vfio_thread, NULL), ==, 0);
    pthread_detach(thread);
    if (!dedup_mount_over(fake.dir, "/dev")) {
        return false;
    }
    g_free(fake.sysfsdev);
    fake.sysfsdev = g_strdup("/dev/0000:00:07.0");
    return true;
}

const char *vfio_fake_sysfsdev(void)
{
    return fake.sysfsdev;
}

uint64_t vfio_fake_mapped(void)
{
    return qatomic_read(&fake.mapped);
}

void vfio_fake_stop(void)
{
    if (fake.dir) {
        dedup_remove_tree(fake.dir);
    }
}
