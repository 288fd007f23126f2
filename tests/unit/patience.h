/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What bounds a hang holds on a host that does other work.  Where all is slower
 * (a guest without KVM, see docs/devel/dedup-kernels.rst) $DEDUP_TEST_PATIENCE
 * says so many times as long; 1 if it is not set.
 */

#ifndef TEST_PATIENCE_H
#define TEST_PATIENCE_H

#include <stdlib.h>

static inline int test_patience(void)
{
    const char *text = getenv("DEDUP_TEST_PATIENCE");
    int times = text ? atoi(text) : 1;

    return times > 0 ? times : 1;
}

#endif /* TEST_PATIENCE_H */
