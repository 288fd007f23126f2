/*
 * The bare guest: the first instruction after reset, and the way to C
 *
 * It is its own firmware (-bios): a KVM that interprets its guest needs
 * minutes for a real one.  The ROM's last 64 KiB appear below 1 MiB and below
 * 4 GiB; the processor starts 16 bytes below their end in real mode.  Three
 * steps: flat 32-bit protected mode without paging and interrupts; copy the
 * program from the ROM to RAM; call it.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define ROM_LOW 0xf0000

        .section .reset, "ax"
        .code16
        .globl reset_start
reset_start:
        cli
        cld
        lgdtl %cs:gdt_pointer - reset_base + RESET_OFFSET
        movl %cr0, %eax
        andl $0x1fffffff, %eax  /* caches on */
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $8, $ROM_LOW + RESET_OFFSET + (protected - reset_base)

        .set reset_base, reset_start

        .code32
protected:
        movw $16, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        /* Words, one by one: string instructions may be missing. */
        movl $ROM_LOW, %esi
        movl $image_start, %edi
1:      movl (%esi), %eax
        movl %eax, (%edi)
        addl $4, %esi
        addl $4, %edi
        cmpl $image_end, %edi
        jb 1b
        movl $stack_top, %esp
        movl $bare_main, %eax
        call *%eax
2:      hlt
        jmp 2b

        .align 8
        /* "Accessed" is set: the processor cannot set it in a ROM. */
gdt:
        .quad 0
        .quad 0x00cf9b000000ffff        /* code, 4 GiB */
        .quad 0x00cf93000000ffff        /* data, 4 GiB */
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long ROM_LOW + RESET_OFFSET + (gdt - reset_base)

        .section .vector, "ax"
        .code16
        /* Entered at f000:fff0. */
        ljmp $0xf000, $RESET_OFFSET

        .bss
        .align 16
        .skip 16384
stack_top:
