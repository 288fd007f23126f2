/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What members of a group say to each other over Unix sockets, private to
 * the group: peer-wire.c has the messages and the proof, peer-server.c the
 * thread that answers, peer-client.c the side that asks.
 *
 * A connection is a SOCK_SEQPACKET socket; one message is one packet.  The
 * server greets with a fresh nonce; then the client sends a request and gets
 * one reply, again and again.  Numbers are in the host's byte order: both
 * ends are on one host.
 *
 *   HELLO    -> the fd of the group's shared file
 *   FETCH    nonce, (gid, page, ask)... -> next nonce, a flag for each, and
 *            the fds of those it gives
 *   PROVE    nonce, (page, ask)... -> next nonce, (yes, answer)...
 *
 * The proof of PROVE.  The asker A has a page and a hint that the holder H
 * has the same.  Each wants to know whether that is so; neither must learn
 * anything of a page that it does not have (I10), even if the other one lies.
 *   - H has greeted with a nonce, A chooses another.  Both compute, from the
 *     two nonces and H's member number by SHA-256, a seed, and from it the
 *     secret of a keyed 128-bit XXH3.  So neither can choose the secret, and
 *     a weak one is not to be had.
 *   - The digest of a page is that XXH3 of it.  It is never sent: XXH3 is no
 *     one-way function, and with the rest of a page known one could solve
 *     it for a key in the page.  What is sent is SHA-256 over the seed, the
 *     role, the place in the list and the digest.
 *   - A sends its value of each page first.  H answers with its own only
 *     where A's is what it expects, that is, where A has the page.
 *   - A nonce serves for one request, so nothing can be played again.  The
 *     member number in the seed keeps a liar from proving a page to A by
 *     asking A itself.
 *
 * FETCH has the first half of it: A says which page of the segment it has,
 * and sends its value of that content, in a role of its own.  The holder, who
 * knows the segment and need not be the publisher, gives the fd only if that
 * is what it expects; else the reply is as if it had no such segment.  The
 * fd then shows all pages of the segment: see docs/devel/dedup.rst.
 *
 * What remains is a guess: who guesses all of a page can have the guess
 * confirmed.  That is so with every merging of pages (a write to a merged
 * page is slow).
 */

#ifndef DEDUP_PEER_H
#define DEDUP_PEER_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "group/group.h"

#define DEDUP_PEER_VERSION 2
#define DEDUP_PEER_MAGIC 0x70756464u    /* "ddup" */
#define DEDUP_NONCE_SIZE 32
#define DEDUP_PROOF_SIZE 16
#define DEDUP_PEER_TIMEOUT_MS 500

/* CPU time that a server has for those who ask before it goes slower. */
#define DEDUP_PEER_CREDIT_NS (2 * INT64_C(1000000000))

typedef enum DedupMessageType {
    DEDUP_MESSAGE_GREETING = 1,
    DEDUP_MESSAGE_HELLO,
    DEDUP_MESSAGE_HELLO_REPLY,
    DEDUP_MESSAGE_FETCH,
    DEDUP_MESSAGE_FETCH_REPLY,
    DEDUP_MESSAGE_PROVE,
    DEDUP_MESSAGE_PROVE_REPLY,
} DedupMessageType;

typedef struct DedupMessageHead {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t n;                 /* entries that follow */
    uint32_t zero;
} DedupMessageHead;

typedef struct DedupFetchAsk {
    uint32_t gid;
    uint32_t page;              /* of the segment */
    uint8_t ask[DEDUP_PROOF_SIZE];
} DedupFetchAsk;

typedef struct DedupProveAsk {
    uint32_t page;
    uint8_t ask[DEDUP_PROOF_SIZE];
} DedupProveAsk;

typedef struct DedupProveAnswer {
    uint32_t yes;
    uint8_t answer[DEDUP_PROOF_SIZE];
} DedupProveAnswer;

typedef struct DedupMessage {
    DedupMessageHead head;
    uint8_t nonce[DEDUP_NONCE_SIZE];    /* HELLO and its reply: none */
    union {                             /* GREETING: none */
        DedupFetchAsk fetch[DEDUP_PEER_BATCH];
        uint8_t has[DEDUP_PEER_BATCH];
        DedupProveAsk ask[DEDUP_PEER_BATCH];
        DedupProveAnswer answer[DEDUP_PEER_BATCH];
    };
} DedupMessage;

/* peer-wire.c: messages */

/* Length of a message of this type with @n entries. */
size_t dedup_message_size(DedupMessageType type, unsigned n);

/*
 * Sends without waiting.  Returns 0 or -errno.  Fills in all of the head but
 * @n.  The fds stay the caller's.
 */
int dedup_message_send(int sock, DedupMessage *m, DedupMessageType type,
                       const int *fds, unsigned nfds);

/*
 * Receives without waiting.  Returns 0, -EAGAIN when there is none, -EPIPE
 * at the end, -EPROTO when it is not a well-formed message; on failure all
 * fds that came are closed.  At most @max_fds are let in.
 */
int dedup_message_receive(int sock, DedupMessage *m, int *fds,
                          unsigned max_fds, unsigned *nfds);

/*
 * True if the process at the other end has our effective user id.  *@pid: who
 * it is, 0 if it is in a PID namespace that we do not see.
 */
bool dedup_peer_is_ours(int sock, pid_t *pid);

/* peer-wire.c: the proof */

typedef struct DedupProofKey {
    uint8_t seed[32];
    uint8_t secret[DEDUP_SECRET_SIZE];
} DedupProofKey;

typedef enum DedupProofRole {
    DEDUP_PROOF_ASK = 'A',
    DEDUP_PROOF_ANSWER = 'H',
    DEDUP_PROOF_FETCH = 'F',
} DedupProofRole;

bool dedup_nonce_make(uint8_t nonce[DEDUP_NONCE_SIZE]);
void dedup_proof_key(DedupProofKey *key,
                     const uint8_t holder_nonce[DEDUP_NONCE_SIZE],
                     const uint8_t asker_nonce[DEDUP_NONCE_SIZE],
                     uint32_t holder);
void dedup_proof_value(const DedupProofKey *key, DedupProofRole role,
                       uint32_t i, const DedupHash128 *digest,
                       uint8_t value[DEDUP_PROOF_SIZE]);

/* peer-server.c */

typedef struct DedupPeerServer DedupPeerServer;

/*
 * Starts the thread, with all signals blocked.  Takes @listen_fd; @shared_fd
 * is handed out to those that say hello and stays the caller's.  Adds its CPU
 * time to *@cpu_ns, for anyone to read (atomic).
 */
DedupPeerServer *dedup_peer_server_new(int listen_fd, int shared_fd,
                                       unsigned self,
                                       const DedupGroupOps *ops, void *opaque,
                                       uint64_t *cpu_ns, GError **error);
/* Stops the thread; no callback runs when it returns. */
void dedup_peer_server_free(DedupPeerServer *s);

/* peer-client.c */

typedef struct DedupPeer {
    int fd;                     /* -1: not connected */
    uint8_t nonce[DEDUP_NONCE_SIZE];
} DedupPeer;

#define DEDUP_PEER_INIT { .fd = -1 }

/*
 * Each returns false when the other side does not answer in @timeout_ms, or
 * answers nonsense; the connection is closed then.
 */
bool dedup_peer_connect(DedupPeer *p, int dirfd, unsigned member,
                        unsigned timeout_ms);
void dedup_peer_close(DedupPeer *p);
/* Does somebody listen there, who may be stopped?  In doubt: yes. */
bool dedup_peer_is_listening(int dirfd, unsigned member);
/* Returns the fd of the shared file, unchecked, or -1. */
int dedup_peer_hello(DedupPeer *p, unsigned timeout_ms);
/* @fd is -1 where the other side gives none (and on failure). */
bool dedup_peer_fetch(DedupPeer *p, unsigned holder, DedupFetch *items,
                      unsigned n, unsigned timeout_ms);
bool dedup_peer_prove(DedupPeer *p, unsigned holder, DedupProof *proofs,
                      unsigned n, unsigned timeout_ms);

#endif /* DEDUP_PEER_H */
