/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The domain of the engine's errors; see error.h.
 */

#include "host/error.h"

GQuark dedup_error_quark(void)
{
    return g_quark_from_static_string("dedup-error-quark");
}
