/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A member of the group that lies, mutant M8: it turns every hint in the
 * shared index into one that says that it has the page, and answers with
 * garbage when it is asked to prove it.  No segment with a page that it does
 * not have may come to it.
 *
 * The victim is a real engine in the test's process, all of its pages are
 * secrets.  The liar is a child that joins the group like anybody else and
 * knows what the secrets look like, so that it can tell when it has one.
 */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "group/group-internal.h"

#define PAGES 2048
#define SECRET(i) (0x5ec0000u + (i) * 1000)

typedef struct Report {
    uint64_t rewritten;
    uint64_t asked;
    uint64_t segments;
    uint64_t stolen;
} Report;

typedef struct Liar {
    DedupGroup *g;
    uint64_t secret[PAGES];     /* the first word of each */
    Report report;
    uint64_t asked;             /* atomic: the peer thread counts */
} Liar;

static void lie(void *opaque, DedupOwnPage *pages, unsigned n,
                const uint8_t *secret)
{
    Liar *l = opaque;

    __atomic_fetch_add(&l->asked, n, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < n; i++) {
        pages[i].is_there = true;
        pages[i].hash = (DedupHash128) {
            .low = pages[i].page, .high = secret[0],
        };
    }
}

static int no_segment(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    return -1;
}

/* Make every candidate ours, page number and all. */
static void rewrite_hints(Liar *l)
{
    uint64_t *table = l->g->file.table;
    off_t end = DEDUP_FILE_INDEX + dedup_index_table_size();
    off_t at = lseek(l->g->file.fd, DEDUP_FILE_INDEX, SEEK_DATA);

    while (at >= 0 && at < end) {
        off_t hole = lseek(l->g->file.fd, at, SEEK_HOLE);
        uint64_t *entry = table + (at - DEDUP_FILE_INDEX) / sizeof(*entry);

        for (; at < hole; at += sizeof(*entry), entry++) {
            uint64_t e = __atomic_load_n(entry, __ATOMIC_RELAXED);
            uint64_t mine = (e & ~((uint64_t)(DEDUP_MAX_MEMBERS - 1) <<
                                   DEDUP_MEMBER_PAGE_BITS)) |
                            (uint64_t)dedup_group_self(l->g) <<
                            DEDUP_MEMBER_PAGE_BITS;

            if (e >> 62 == DEDUP_HINT_CANDIDATE && e != mine &&
                __atomic_compare_exchange_n(entry, &e, mine, false,
                                            __ATOMIC_SEQ_CST,
                                            __ATOMIC_SEQ_CST)) {
                l->report.rewritten++;
            }
        }
        at = lseek(l->g->file.fd, at, SEEK_DATA);
    }
}

static void look_into(Liar *l, int fd, unsigned npages)
{
    uint64_t word[FX_PAGE / sizeof(uint64_t)];

    for (unsigned p = 0; p < npages; p++) {
        if (pread(fd, word, FX_PAGE, (off_t)p * FX_PAGE) != FX_PAGE) {
            return;
        }
        for (unsigned i = 0; i < PAGES; i++) {
            l->report.stolen += word[0] == l->secret[i];
        }
    }
}

static bool collect(void *opaque, uint32_t gid, unsigned npages,
                    bool ours, const DedupSegmentUse *own,
                    const DedupSegmentUse *others)
{
    GArray *gids = opaque;

    g_array_append_val(gids, gid);
    return true;
}

/*
 * Whoever has the segment wants to see one of its pages.  So that a segment
 * which should not be there is found, the liar guesses its first page, from
 * among all secrets.
 */
static int guess(Liar *l, uint32_t gid, unsigned member)
{
    g_autofree uint8_t *pages = g_malloc(DEDUP_PEER_BATCH * FX_PAGE);
    int fd = -1;

    for (unsigned first = 0; first < PAGES && fd < 0;
         first += DEDUP_PEER_BATCH) {
        DedupFetch items[DEDUP_PEER_BATCH];

        for (unsigned i = 0; i < DEDUP_PEER_BATCH; i++) {
            uint8_t *page = pages + i * FX_PAGE;

            fx_content(page, SECRET(first + i));
            items[i] = (DedupFetch) { .gid = gid, .content = page };
        }
        dedup_group_fetch(l->g, member, items, DEDUP_PEER_BATCH);
        for (unsigned i = 0; i < DEDUP_PEER_BATCH; i++) {
            if (fd < 0) {
                fd = items[i].fd;
            } else if (items[i].fd >= 0) {
                close(items[i].fd);
            }
        }
    }
    return fd;
}

static void steal(Liar *l)
{
    g_autoptr(GArray) gids = g_array_new(false, false, sizeof(uint32_t));

    dedup_group_foreach_segment(l->g, collect, gids);
    for (unsigned i = 0; i < gids->len; i++) {
        uint32_t gid = g_array_index(gids, uint32_t, i);
        unsigned member, npages;
        int fd = -1;

        if (dedup_group_segment_lookup(l->g, gid, &member, &npages)) {
            fd = guess(l, gid, member);
        }
        if (fd >= 0) {
            l->report.segments++;
            look_into(l, fd, npages);
            close(fd);
        }
    }
}

static void liar_main(int sock, const char *dir)
{
    static const DedupGroupOps ops = {
        .keyed_hashes = lie, .segment_fd = no_segment,
    };
    Liar *l = g_new0(Liar, 1);
    uint64_t page[FX_PAGE / sizeof(uint64_t)];
    char command;

    for (unsigned i = 0; i < PAGES; i++) {
        fx_content(page, SECRET(i));
        l->secret[i] = page[0];
    }
    l->g = dedup_group_new(dir, NULL);
    if (!l->g || !dedup_group_join(l->g, &ops, l, NULL)) {
        _exit(1);
    }
    for (;;) {
        ssize_t n = recv(sock, &command, 1, MSG_DONTWAIT);

        if (n == 0) {
            _exit(0);           /* the test is gone */
        }
        dedup_group_refresh(l->g);
        rewrite_hints(l);
        steal(l);
        if (n == 1) {
            l->report.asked = __atomic_load_n(&l->asked, __ATOMIC_RELAXED);
            if (send(sock, &l->report, sizeof(l->report), 0) < 0) {
                _exit(1);
            }
        }
        g_usleep(2000);
    }
}

static void ask_liar(int sock, Report *report)
{
    g_assert_cmpint(send(sock, "?", 1, MSG_NOSIGNAL), ==, 1);
    g_assert_cmpint(recv(sock, report, sizeof(*report), 0), ==,
                    sizeof(*report));
}

static void test_liar(gconstpointer data)
{
    char *dir = fx_group_dir();
    Report report = { 0 };
    gint64 end;
    FxEngine *fe;
    FxView view;
    FxRam *ram;
    pid_t pid;
    int sv[2];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sv), ==, 0);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        close(sv[0]);
        liar_main(sv[1], dir);
    }
    close(sv[1]);
    ask_liar(sv[0], &report);   /* it has joined */

    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, SECRET(i));
    }
    fe = fx_engine_new(dir);
    fx_add(fe, ram);
    fx_engine_start(fe);

    /* every hint was claimed, and proofs asked for, a few times over */
    end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;
    do {
        if (g_get_monotonic_time() > end) {
            fx_fail("liar is not asked", "%" G_GUINT64_FORMAT " hints, %"
                    G_GUINT64_FORMAT " proofs", report.rewritten,
                    report.asked);
        }
        fx_wait_scans(fe, 5);
        ask_liar(sv[0], &report);
    } while (!report.stolen &&
             (report.rewritten < 2 * PAGES || report.asked < PAGES));
    if (report.stolen) {
        fx_fail("liar has a secret", "%" G_GUINT64_FORMAT " pages",
                report.stolen);
    }
    g_test_message("%" G_GUINT64_FORMAT " hints rewritten, %"
                   G_GUINT64_FORMAT " proofs failed", report.rewritten,
                   report.asked);
    /* nor was anything published for it */
    g_assert_cmpuint(report.segments, ==, 0);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(ram);

    kill(pid, SIGKILL);
    g_assert_cmpint(waitpid(pid, NULL, 0), ==, pid);
    close(sv[0]);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    fx_group_dir_free(dir);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/liar/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_liar);
    g_test_add_data_func("/liar/anon", GINT_TO_POINTER(FX_ANON), test_liar);
    return g_test_run();
}
