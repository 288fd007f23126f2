/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Packets of the group's protocol as an enemy sends them; see fuzz-packet.h.
 */

#include <string.h>
#include <sys/socket.h>

#include "fuzz-packet.h"

void fuzz_send(int sock, const void *data, size_t size, const int *fds,
               unsigned nfds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(FUZZ_FDS_MOST * sizeof(int))];
    } control = { 0 };
    struct iovec iov = { .iov_base = (void *)data, .iov_len = size };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (nfds) {
        struct cmsghdr *h;

        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        h = CMSG_FIRSTHDR(&msg);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(h), fds, nfds * sizeof(int));
    }
    sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}
