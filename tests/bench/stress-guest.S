/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The program of stress-dedup's vCPU: 32-bit protected mode, flat segments,
 * no paging, no stack, no interrupts.  It is copied to CODE of the guest's
 * own memory (stress-kvm.c) and goes round for ever:
 *
 *   take a random page; check that the vCPU's slot holds what the shadow says;
 *   store the marks of another value; note it in the shadow; check again;
 *   the same page four times, because coming to a page may take a while.
 *
 * Every 16 pages, and at the first mistake, it writes to an I/O port, which
 * brings the host back.
 *
 * Registers: ebx value, esi page number, edi address of the slot, ebp mailbox.
 */

#define MAILBOX 0x2000
#define SHADOW 0x10000
#define SLOT_OFFSET 3072
#define MARKS_END 1024          /* 256 words; a mark every 32 words */
#define MARK_STEP 128           /* bytes */

/* The mailbox's words, as in struct Mailbox. */
#define PAGES_EACH 0(%ebp)
#define PAGES_ALL 4(%ebp)
#define BASE_0 8(%ebp)
#define BASE_1 12(%ebp)
#define RANDOM 16(%ebp)
#define DONE 20(%ebp)
#define BAD_PAGE 24(%ebp)
#define BAD_WORD 28(%ebp)
#define BAD_GOT 32(%ebp)
#define BAD_WANT 36(%ebp)

        .section .rodata
        .globl stress_guest_start, stress_guest_end
        .code32
stress_guest_start:
        movl $MAILBOX, %ebp
next:
        movl RANDOM, %eax
        imull $1664525, %eax, %eax
        addl $1013904223, %eax
        movl %eax, RANDOM
        shrl $8, %eax
        xorl %edx, %edx
        divl PAGES_ALL
        movl %edx, %esi                 /* page */
        movl %edx, %edi
        movl BASE_0, %eax
        cmpl PAGES_EACH, %edi
        jb 1f
        subl PAGES_EACH, %edi
        movl BASE_1, %eax
1:      shll $12, %edi
        leal SLOT_OFFSET(%edi,%eax), %edi
        movzbl SHADOW(%esi), %ebx

again:
        /* check what is there */
        xorl %ecx, %ecx                 /* offset in the slot */
2:      xorl %edx, %edx
        testl %ebx, %ebx
        jz 3f
        movl %ebx, %edx
        shll $16, %edx
        movl %ecx, %eax
        shrl $2, %eax
        leal 0x83000000(%edx,%eax), %edx
3:      movl (%edi,%ecx), %eax
        cmpl %edx, %eax
        jne bad
        addl $MARK_STEP, %ecx
        cmpl $MARKS_END, %ecx
        jb 2b

        /* the next value: 0 to 1 or 2; else mostly to 0 */
        movl RANDOM, %eax
        shrl $4, %eax
        testl %ebx, %ebx
        jnz 4f
        andl $1, %eax
        leal 1(%eax), %ebx
        jmp 6f
4:      andl $3, %eax
        jz 5f
        xorl %ebx, %ebx
        jmp 6f
5:      negl %ebx
        addl $3, %ebx

        /* store its marks */
6:      xorl %ecx, %ecx
7:      xorl %edx, %edx
        testl %ebx, %ebx
        jz 8f
        movl %ebx, %edx
        shll $16, %edx
        movl %ecx, %eax
        shrl $2, %eax
        leal 0x83000000(%edx,%eax), %edx
8:      movl %edx, (%edi,%ecx)
        addl $MARK_STEP, %ecx
        cmpl $MARKS_END, %ecx
        jb 7b
        movb %bl, SHADOW(%esi)

        /* check again */
        xorl %ecx, %ecx
9:      xorl %edx, %edx
        testl %ebx, %ebx
        jz 10f
        movl %ebx, %edx
        shll $16, %edx
        movl %ecx, %eax
        shrl $2, %eax
        leal 0x83000000(%edx,%eax), %edx
10:     movl (%edi,%ecx), %eax
        cmpl %edx, %eax
        jne bad
        addl $MARK_STEP, %ecx
        cmpl $MARKS_END, %ecx
        jb 9b

        incl DONE
        testl $3, DONE
        jnz again
        testl $63, DONE
        jnz next
        outb %al, $0x10
        jmp next

bad:
        movl %esi, BAD_PAGE
        movl %ecx, BAD_WORD
        movl %eax, BAD_GOT
        movl %edx, BAD_WANT
        outb %al, $0x11
        jmp bad
stress_guest_end:
        .code64

        .section .note.GNU-stack, "", @progbits
