/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The domain of the engine's errors; see error.h.
 */

#include <errno.h>
#include <stdarg.h>

#include "host/error.h"

GQuark dedup_error_quark(void)
{
    return g_quark_from_static_string("dedup-error-quark");
}

void dedup_error_errno(GError **error, const char *format, ...)
{
    int err = errno;
    g_autofree char *what = NULL;
    va_list args;

    va_start(args, format);
    what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, DEDUP_ERROR,
                err == ENOMEM || err == ENOSPC ? DEDUP_ERROR_MEMORY
                                               : DEDUP_ERROR_SYSTEM,
                "%s: %s", what, g_strerror(err));
}
