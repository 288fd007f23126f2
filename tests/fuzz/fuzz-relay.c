/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: the queues of the vhost-user relay, between a guest that offers
 * requests and a back end that does anything.
 *
 * The test of the same name takes a step and what it does from random numbers;
 * here these are the input.  What is looked at after each step it says.  Its
 * source is a part of this one: it is built beside QEMU's unit tests.
 */

#define main test_main
#include "test-vhost-user-relay-fuzz.c"
#undef main
#include "fuzz-input.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    int none = 1;

    fake_main(&none, argv);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree uint8_t *input = g_malloc0(size + 2);
    bool goes_on = true;

    /* the first number says whether a thread writes, too: none */
    memcpy(input + 2, data, size);
    fake_feed(input, size + 2);
    seed = 1;
    begin_round();
    for (unsigned n = 0; goes_on && fake_is_fed(); n++) {
        goes_on = step(fake_random(QUEUES));
        check(n);
    }
    fake_feed(NULL, 0);
    end_round();
    return 0;
}
