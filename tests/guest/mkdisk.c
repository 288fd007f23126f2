/*
 * Write a raw disk whose blocks a guest agent can check
 *
 * mkdisk FILE BLOCKS SEED DISTINCT: 4 KiB blocks, block b holds the contents
 * of pg_disk_key(SEED, b, DISTINCT).  The agent's "dio-start" takes the same
 * numbers.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdio.h>
#include "pagegen.h"

int main(int argc, char **argv)
{
    unsigned long long blocks, seed, distinct;
    static uint8_t page[PG_SIZE];
    FILE *f;

    if (argc != 5 || sscanf(argv[2], "%llu", &blocks) != 1 ||
        sscanf(argv[3], "%llu", &seed) != 1 ||
        sscanf(argv[4], "%llu", &distinct) != 1 || !distinct) {
        fprintf(stderr, "usage: mkdisk FILE BLOCKS SEED DISTINCT\n");
        return 2;
    }
    f = fopen(argv[1], "wb");
    if (!f) {
        perror(argv[1]);
        return 1;
    }
    for (uint64_t b = 0; b < blocks; b++) {
        pg_fill(page, pg_disk_key(seed, b, distinct));
        if (fwrite(page, sizeof(page), 1, f) != 1) {
            perror(argv[1]);
            return 1;
        }
    }
    if (fclose(f)) {
        perror(argv[1]);
        return 1;
    }
    return 0;
}
