/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the fuzzers share: an input is read as a program, a byte or a word at a
 * time, and reads as zeros behind its end.  What is wrong aborts: libFuzzer
 * keeps the input.
 */

#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <fcntl.h>
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* In the place of dedup_nonce_make(), where a fuzzer has one of its own. */
bool __wrap_dedup_nonce_make(uint8_t *nonce);

typedef struct FuzzInput {
    const uint8_t *at;
    size_t left;
} FuzzInput;

static inline void fuzz_bytes(FuzzInput *in, void *to, size_t n)
{
    size_t have = MIN(n, in->left);

    if (have) {
        memcpy(to, in->at, have);
    }
    memset((char *)to + have, 0, n - have);
    in->at += have;
    in->left -= have;
}

static inline uint8_t fuzz_u8(FuzzInput *in)
{
    uint8_t x;

    fuzz_bytes(in, &x, sizeof(x));
    return x;
}

static inline uint32_t fuzz_u32(FuzzInput *in)
{
    uint32_t x;

    fuzz_bytes(in, &x, sizeof(x));
    return x;
}

static inline uint64_t fuzz_u64(FuzzInput *in)
{
    uint64_t x;

    fuzz_bytes(in, &x, sizeof(x));
    return x;
}

/*
 * The lowest number that is free: what it is before an input it is after, or
 * a descriptor was left open.
 */
static inline int fuzz_lowest_fd(void)
{
    int fd = fcntl(0, F_DUPFD_CLOEXEC, 0);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    return fd;
}

#endif /* FUZZ_INPUT_H */
