/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A boot sector that reads and writes its disk by the firmware's INT 13h, for
 * a host whose KVM runs no Linux.
 *
 * For ever: block 0 to BLOCKS - 1, SECTORS long each, from FIRST on, is read
 * to a segment of its own, its sum said on COM1 as eight hexadecimal digits
 * (of each 32-bit word: rotate left by one, add), and written to the same
 * place of the second half of the disk.  "round" after the last; "failed" and
 * a halt if the firmware says so.
 */

#define BLOCKS 8
#define SECTORS 64
#define FIRST 8
#define COPY (FIRST + BLOCKS * SECTORS)

        .code16
        .globl _start
_start: ljmp    $0, $1f
1:      cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        cld
        mov     %dl, drive

round:  movl    $FIRST, lba
        movw    $0x1000, segment

block:  mov     $0x42, %ah
        call    disk

        mov     segment, %es
        xor     %di, %di
        xor     %eax, %eax
        mov     $(SECTORS * 128), %cx
1:      rol     $1, %eax
        add     %es:(%di), %eax
        add     $4, %di
        loop    1b

        mov     $8, %cx
1:      rol     $4, %eax
        push    %ax
        and     $15, %al
        cmp     $10, %al
        jb      2f
        add     $('a' - '0' - 10), %al
2:      add     $'0', %al
        call    say
        pop     %ax
        loop    1b
        mov     $'\n', %al
        call    say

        addl    $(COPY - FIRST), lba
        mov     $0x4300, %ax
        call    disk
        subl    $(COPY - FIRST - SECTORS), lba
        addw    $0x1000, segment
        cmpl    $(FIRST + BLOCKS * SECTORS), lba
        jb      block

        mov     $done, %si
        call    text
        jmp     round

/* INT 13h of AH; the packet is consumed. */
disk:   movw    $SECTORS, count
        mov     $packet, %si
        mov     drive, %dl
        int     $0x13
        jc      1f
        ret
1:      mov     $failed, %si
        call    text
2:      hlt
        jmp     2b

/* The text at SI. */
text:   lodsb
        test    %al, %al
        jz      1f
        call    say
        jmp     text
1:      ret

/* The character in AL; DX is lost. */
say:    push    %ax
        mov     $0x3fd, %dx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        pop     %ax
        mov     $0x3f8, %dx
        out     %al, %dx
        ret

done:   .asciz  "round\n"
failed: .asciz  "failed\n"
drive:  .byte   0
        .balign 4
packet: .byte   16, 0
count:  .word   0
        .word   0                       /* offset */
segment: .word  0
lba:    .long   0, 0

        .org    510
        .word   0xaa55
