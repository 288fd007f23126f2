/*
 * The bare guest: pages that are written and checked without an OS
 *
 * For a host whose KVM runs no Linux, and for a vCPU that does nothing but
 * store and compare.  It goes round its memory from 2 MiB to the end for
 * ever: each page is checked, and some pages get a new generation.
 *
 * Such a KVM may interpret each instruction.  So a page holds few words that
 * are not zero, its marks: MARKS of them, at offsets and with values that
 * follow from the page's generation.  A round checks the marks and one word
 * that must be zero; the command 'v' checks every word.  Going to the next
 * generation first clears the old marks, one store each, then writes the new.
 *
 * Contents: values follow from (generation % 4, page % RUN), so that every page
 * has many equals, in runs.  One page in 16 is zero in odd generations; one
 * page in 32 is unique.  All that is neither also follows from the page's era,
 * which is that of the guest when it was written.
 *
 * Serial port (COM1, polled): it says "ready N" (N pages), then "round R
 * errors E" after each round.  Commands are single bytes: 'q' only checks,
 * 'w' writes one page in eight as well (the start), 'b' writes every page,
 * 'v' checks every word of every page once, says "verified errors E", and
 * goes on.  128 + E: it is era E from now on, in which contents are others.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdint.h>

#define COM1 0x3f8
#define FW_CFG 0x510
#define FW_CFG_RAM_SIZE 3
#define PAGE 4096u
#define WORDS (PAGE / 4)
#define FIRST (2u << 20)
#define RUN 64
#define MAX_PAGES (1u << 18)
#define MARKS 8
#define SPACING (WORDS / MARKS)

/* Guest memory: volatile, as others change it; each access is one of ours. */
typedef volatile uint32_t Word;

static uint8_t gen[MAX_PAGES], era[MAX_PAGES];
static uint8_t era_now;
static uint32_t pages, round, errors;

static inline void out8(uint16_t port, uint8_t v)
{
    asm volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t v;

    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static inline void out16(uint16_t port, uint16_t v)
{
    asm volatile("outw %0, %1" : : "a"(v), "Nd"(port));
}

static void say(const char *text)
{
    uint8_t ready;

    for (; *text; text++) {
        do {
            ready = in8(COM1 + 5) & 0x20;
        } while (!ready);
        out8(COM1, *text);
    }
}

static void say_number(uint32_t v)
{
    char text[11];
    char *p = text + 10;

    *p = 0;
    do {
        *--p = '0' + v % 10;
        v /= 10;
    } while (v);
    say(p);
}

static Word *page_at(uint32_t i)
{
    return (Word *)(FIRST + i * PAGE);
}

/* What page @i's marks are made from; 0 means a page of zeros. */
static uint32_t seed_of(uint32_t i)
{
    uint32_t g = gen[i];

    if (i % 16 == 5 && g % 2) {
        return 0;
    }
    if (i % 32 == 9) {
        return 0x80000001u | i << 8 | g << 1;
    }
    return 0x40000001u | (g % 4) << 16 | era[i] << 7 | i % RUN << 1;
}

/* Where mark @k of page @i is: once in each eighth of the page. */
static uint32_t place_of(uint32_t i, uint32_t k)
{
    return k * SPACING + (gen[i] % 4 * 5 + k) % SPACING;
}

static void set_marks(uint32_t i, int clear)
{
    Word *w = page_at(i);
    uint32_t seed = seed_of(i);

    for (uint32_t k = 0; k < MARKS; k++) {
        w[place_of(i, k)] = clear || !seed ? 0 : seed + (k << 24);
    }
}

static void check_word(uint32_t i, uint32_t at, uint32_t expected)
{
    uint32_t found = page_at(i)[at];

    if (found != expected) {
        if (errors++ < 8) {
            say("bad page ");
            say_number(i);
            say(" word ");
            say_number(at);
            say(" found ");
            say_number(found);
            say(" expected ");
            say_number(expected);
            say("\n");
        }
        page_at(i)[at] = expected;
    }
}

/* Check the marks of page @i, and one word that is no mark. */
static void check(uint32_t i)
{
    uint32_t seed = seed_of(i);
    uint32_t odd = (round * 37 + i) % WORDS;

    for (uint32_t k = 0; k < MARKS; k++) {
        check_word(i, place_of(i, k), seed ? seed + (k << 24) : 0);
    }
    if (odd != place_of(i, odd / SPACING)) {
        check_word(i, odd, 0);
    }
}

/* Check every word of page @i; few instructions a word while all is well. */
static void check_all(uint32_t i)
{
    Word *w = page_at(i);

    check(i);
    for (uint32_t k = 0; k < MARKS; k++, w += SPACING) {
        uint32_t mark = w[place_of(i, k) % SPACING];
        uint32_t any = 0, sum = 0;

        for (uint32_t j = 0; j < SPACING; j += 4) {
            any |= w[j] | w[j + 1] | w[j + 2] | w[j + 3];
            sum += w[j] + w[j + 1] + w[j + 2] + w[j + 3];
        }
        if (any == mark && sum == mark) {
            continue;
        }
        for (uint32_t j = k * SPACING; j < (k + 1) * SPACING; j++) {
            if (j != place_of(i, k)) {
                check_word(i, j, 0);
            }
        }
    }
}

static uint32_t ram_size(void)
{
    uint32_t size = 0;

    out16(FW_CFG, FW_CFG_RAM_SIZE);
    for (int i = 0; i < 4; i++) {
        size |= (uint32_t)in8(FW_CFG + 1) << 8 * i;
    }
    return size;
}

static void verify(void)
{
    for (uint32_t i = 0; i < pages; i++) {
        check_all(i);
    }
    say("verified errors ");
    say_number(errors);
    say("\n");
}

void bare_main(void)
{
    uint32_t random = 1;
    char mode = 'w';

    out8(COM1 + 1, 0);          /* no interrupts */
    out8(COM1 + 3, 3);          /* 8N1 */
    pages = (ram_size() - FIRST) / PAGE;
    if (pages > MAX_PAGES) {
        pages = MAX_PAGES;
    }
    for (uint32_t i = 0; i < pages; i++) {
        set_marks(i, 0);
    }
    say("ready ");
    say_number(pages);
    say("\n");
    for (round = 1; ; round++) {
        for (uint32_t i = 0; i < pages; i++) {
            check(i);
            random = random * 1664525u + 1013904223u;
            if (mode == 'b' || (mode == 'w' && random >> 24 < 32)) {
                set_marks(i, 1);
                gen[i]++;
                era[i] = era_now;
                set_marks(i, 0);
            }
        }
        say("round ");
        say_number(round);
        say(" errors ");
        say_number(errors);
        say("\n");
        if (in8(COM1 + 5) & 1) {
            uint8_t c = in8(COM1);

            if (c == 'v') {
                verify();
            } else if (c >= 128) {
                era_now = c - 128;
            } else {
                mode = c;
            }
        }
    }
}
