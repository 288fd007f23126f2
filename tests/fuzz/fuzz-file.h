/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Descriptors that an enemy may hand over, of every kind: what a member takes
 * for a segment or for the group's shared file.
 */

#ifndef FUZZ_FILE_H
#define FUZZ_FILE_H

#include "fuzz-input.h"

/* Contents of page @i of a file that has memory there. */
void fuzz_file_page(uint8_t *page, unsigned i);

/*
 * As the input says; always a descriptor.  *@npages is about how long it is.
 */
int fuzz_file(FuzzInput *in, unsigned *npages);

/* What somebody who kept a descriptor of it does to it. */
void fuzz_file_attack(FuzzInput *in, int fd);

#endif /* FUZZ_FILE_H */
