/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A mutant of the QEMU side: what the linker puts in front of what
 */

#ifndef TESTS_GUEST_MUTANT_GUARD_H
#define TESTS_GUEST_MUTANT_GUARD_H

#include <stdbool.h>

/* As in qemu/ram-guard.h; the pointers are only handed on. */
bool __wrap_ram_guard_whole_get(void **user, void *rb, const char *name,
                                void **errp);
bool __real_ram_guard_whole_get(void **user, void *rb, const char *name,
                                void **errp);

#endif
