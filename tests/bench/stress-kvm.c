/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A vCPU as a writer: KVM's page tables are filled and invalidated behind
 * this process's back, and its stores never pass through our own.
 *
 * The guest is a few instructions (stress-guest.S) in memory of its own at
 * guest address 0; the RAMs under test follow further up.
 *
 * Thread: the writer's own makes the vCPU and runs it.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "stress.h"

/* As in stress-guest.S. */
#define CODE 0x1000
#define MAILBOX 0x2000
#define SHADOW 0x10000
#define PORT_ALIVE 0x10
#define PORT_BAD 0x11

#define PRIVATE_SIZE (1u << 20)
#define RAM_BASE 0x10000000u
#define RAM_STRIDE 0x10000000u

/* Shared with the guest. */
typedef struct Mailbox {
    uint32_t pages_each;
    uint32_t pages_all;
    uint32_t base[STRESS_RAMS];
    uint32_t random;
    StressWord done;          /* changes while we look */
    uint32_t bad_page;
    uint32_t bad_word;
    uint32_t bad_got;
    uint32_t bad_want;
} Mailbox;

typedef struct Vm {
    int kvm;
    int vm;
    int vcpu;
    uint8_t *private;         /* the guest's memory at address 0 */
    struct kvm_run *run;
    size_t run_size;
} Vm;

static bool add_slot(Vm *vm, unsigned slot, uint64_t at, void *host,
                     uint64_t size)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .guest_phys_addr = at,
        .memory_size = size,
        .userspace_addr = (uintptr_t)host,
    };

    return ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region) == 0;
}

static void flat(struct kvm_segment *segment, uint8_t type)
{
    *segment = (struct kvm_segment) {
        .limit = 0xffffffff, .selector = type == 11 ? 8 : 16, .present = 1,
        .type = type, .db = 1, .s = 1, .g = 1,
    };
}

/* 32-bit protected mode from the first instruction on. */
static bool set_registers(Vm *vm)
{
    struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
    struct kvm_sregs sregs;

    if (ioctl(vm->vcpu, KVM_GET_SREGS, &sregs) < 0) {
        return false;
    }
    flat(&sregs.cs, 11);      /* code: execute, read */
    flat(&sregs.ds, 3);       /* data: read, write */
    sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.ds;
    sregs.cr0 |= 1;           /* PE */
    return ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) == 0 &&
           ioctl(vm->vcpu, KVM_SET_REGS, &regs) == 0;
}

static void vm_free(Vm *vm)
{
    if (vm->run) {
        munmap(vm->run, vm->run_size);
    }
    if (vm->vcpu >= 0) {
        close(vm->vcpu);
    }
    if (vm->vm >= 0) {
        close(vm->vm);
    }
    if (vm->kvm >= 0) {
        close(vm->kvm);
    }
    if (vm->private) {
        munmap(vm->private, PRIVATE_SIZE);
    }
    g_free(vm);
}

static bool vm_setup(StressWriter *w, Vm *vm)
{
    Stress *s = w->s;
    void *map = mmap(NULL, PRIVATE_SIZE, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    Mailbox *box;
    int size;

    if (map == MAP_FAILED) {
        return false;
    }
    vm->private = map;
    vm->vm = ioctl(vm->kvm, KVM_CREATE_VM, 0);
    if (vm->vm < 0 || !add_slot(vm, 0, 0, map, PRIVATE_SIZE)) {
        return false;
    }
    box = (Mailbox *)(vm->private + MAILBOX);
    box->pages_each = s->pages;
    box->pages_all = s->pages * STRESS_RAMS;
    box->random = w->random;
    for (unsigned i = 0; i < STRESS_RAMS; i++) {
        box->base[i] = RAM_BASE + i * RAM_STRIDE;
        if (!add_slot(vm, i + 1, box->base[i], s->rams[i].host,
                      (uint64_t)s->pages * STRESS_PAGE)) {
            return false;
        }
    }
    memcpy(vm->private + CODE, stress_guest_start,
           stress_guest_end - stress_guest_start);
    /* the guest keeps the record itself */
    w->shadow = vm->private + SHADOW;

    vm->vcpu = ioctl(vm->vm, KVM_CREATE_VCPU, 0);
    size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (vm->vcpu < 0 || size < 0) {
        return false;
    }
    vm->run_size = size;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
    if (map == MAP_FAILED) {
        return false;
    }
    vm->run = map;
    return set_registers(vm);
}

static const char *kvm_open(StressWriter *w)
{
    Vm *vm;

    if (w->s->freeze == DEDUP_FREEZE_MPROTECT) {
        return "a KVM guest that runs cannot wait for mprotect()";
    }
    if (w->s->pages * STRESS_RAMS > PRIVATE_SIZE - SHADOW ||
        (uint64_t)w->s->pages * STRESS_PAGE > RAM_STRIDE) {
        return "too many pages for the guest's own memory";
    }
    vm = g_new0(Vm, 1);
    vm->vm = vm->vcpu = -1;
    vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->kvm < 0) {
        g_free(vm);
        return "no /dev/kvm";
    }
    if (ioctl(vm->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION ||
        !vm_setup(w, vm)) {
        vm_free(vm);
        w->shadow = NULL;
        return "this KVM makes no 32-bit guest";
    }
    w->data = vm;
    return NULL;
}

static void tell_bad(StressWriter *w, const Mailbox *box)
{
    uint32_t page = box->bad_page;

    stress_fail(w->s, "%s: page %u of %s: byte %u of the slot is 0x%x instead "
                "of 0x%x, seen by the guest", w->name, page % w->s->pages,
                w->s->rams[page / w->s->pages % STRESS_RAMS].name,
                box->bad_word, box->bad_got, box->bad_want);
}

static void kvm_run(StressWriter *w)
{
    Vm *vm = w->data;
    Mailbox *box = (Mailbox *)(vm->private + MAILBOX);

    while (stress_go_on(w->s)) {
        if (ioctl(vm->vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN) {
                continue;
            }
            stress_fail(w->s, "KVM_RUN: %s", g_strerror(errno));
            return;
        }
        if (vm->run->exit_reason != KVM_EXIT_IO) {
            stress_fail(w->s, "the vCPU stopped, exit reason %u",
                        vm->run->exit_reason);
            return;
        }
        __atomic_store_n(&w->writes, box->done, __ATOMIC_RELAXED);
        if (vm->run->io.port == PORT_BAD) {
            tell_bad(w, box);
            return;
        }
    }
}

static void kvm_close(StressWriter *w)
{
    w->shadow = NULL;
    vm_free(w->data);
}

StressWriter stress_kvm = {
    .name = "KVM vCPU", .slot = STRESS_KVM_SLOT,
    .open = kvm_open, .run = kvm_run, .close = kvm_close,
};
