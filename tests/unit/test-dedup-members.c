/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Three processes of one group, rounds of contents as in LTP's ksm01, case
 * C3: {c,a,a}, {c,b,a}, {d,d,d}, {d,d,d but for one page e}.  In each round
 * the counters are what one computes, and every byte of every process is
 * right.
 *
 * And a thief: a member of the group that knows all segments, and wants to
 * see pages that it does not have.
 *
 * The processes are children that do what the test tells them over a socket,
 * one command at a time.
 */

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "group/group.h"

#define MEMBERS 3
#define PAGES 256

typedef enum Command {
    FILL,           /* every page from one seed; wait until it is merged */
    ONE_PAGE,       /* one page from a seed of its own */
    MIXED,          /* half of it pairs of its own, half common to all */
    SETTLE,         /* full scans that find nothing more */
    CHECK,          /* compare every byte; the view from outside */
    QUIT,
} Command;

typedef struct Order {
    Command command;
    uint64_t seed;
} Order;

typedef struct Report {
    DedupStats stats;
    FxView view;
    FxSegments segments;
} Report;

typedef struct Member {
    pid_t pid;
    int sock;
} Member;

#define OWN_SEED(seed, i) ((uint64_t)(seed) << 32 | (i) / 2 * 1000)
#define COMMON_SEED(i) (UINT64_C(0xc0) << 32 | (i) * 1000)

static bool all_merged(void *opaque)
{
    return dedup_region_pages_merged(opaque) == PAGES;
}

static void obey(FxEngine *fe, FxRam *ram, const Order *order)
{
    switch (order->command) {
    case FILL:
        for (uint32_t i = 0; i < PAGES; i++) {
            fx_page(ram, i, order->seed);
        }
        fx_wait_scans(fe, 2);
        fx_wait_until(all_merged, ram->region, "not merged");
        break;
    case ONE_PAGE:
        fx_page(ram, PAGES / 2, order->seed);
        break;
    case MIXED:
        for (uint32_t i = 0; i < PAGES; i++) {
            fx_page(ram, i, i < PAGES / 2 ? OWN_SEED(order->seed, i)
                                          : COMMON_SEED(i));
        }
        break;
    case SETTLE:
        fx_wait_settled(fe);
        break;
    case CHECK:
        fx_assert_bytes(ram);
        break;
    case QUIT:
        fx_engine_free(fe);
        fx_assert_bytes(ram);
        _exit(0);
    }
}

static void member_main(int sock, FxKind kind, const char *dir)
{
    FxRam *ram = fx_ram_new(kind, PAGES);
    FxEngine *fe = fx_engine_new(dir);
    Order order;

    fx_add(fe, ram);
    fx_engine_start(fe);
    while (recv(sock, &order, sizeof(order), 0) == sizeof(order)) {
        Report report;

        obey(fe, ram, &order);
        fx_stats(fe, &report.stats);
        fx_view(ram, &report.view);
        fx_segments(&report.segments);
        if (send(sock, &report, sizeof(report), 0) != sizeof(report)) {
            _exit(1);
        }
    }
    _exit(1);   /* the test is gone */
}

static void member_start(Member *m, FxKind kind, const char *dir)
{
    int sv[2];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sv), ==, 0);
    m->pid = fork();
    g_assert_cmpint(m->pid, >=, 0);
    if (!m->pid) {
        close(sv[0]);
        member_main(sv[1], kind, dir);
    }
    close(sv[1]);
    m->sock = sv[0];
}

static void tell(const Member *m, Command command, uint64_t seed,
                 Report *report)
{
    Order order = { .command = command, .seed = seed };

    g_assert_cmpint(send(m->sock, &order, sizeof(order), MSG_NOSIGNAL), ==,
                    sizeof(order));
    if (recv(m->sock, report, sizeof(*report), 0) != sizeof(*report)) {
        fx_fail("member died", "pid %d", m->pid);
    }
}

/* What all members together are expected to say. */
typedef struct Expected {
    Member *members;
    uint64_t shared;
    uint64_t sharing;
    uint64_t own;           /* pages with memory of their own */
    Report report[MEMBERS];
    char *why;
} Expected;

G_GNUC_PRINTF(2, 3)
static bool not_yet(Expected *e, const char *format, ...)
{
    va_list args;

    g_free(e->why);
    va_start(args, format);
    e->why = g_strdup_vprintf(format, args);
    va_end(args);
    return false;
}

/* Counters follow within half a second: not before all of them are right. */
static bool as_computed(void *opaque)
{
    Expected *e = opaque;
    uint64_t merged = 0, own = 0;

    for (unsigned i = 0; i < MEMBERS; i++) {
        Report *r = &e->report[i];
        const DedupGroupStats *g = &r->stats.group;

        tell(&e->members[i], CHECK, 0, r);
        if (!r->stats.in_group || g->members != MEMBERS ||
            g->pages_shared != e->shared || g->pages_sharing != e->sharing) {
            return not_yet(e, "member %u says: members %" G_GUINT64_FORMAT
                           ", shared %" G_GUINT64_FORMAT ", sharing %"
                           G_GUINT64_FORMAT, i, g->members, g->pages_shared,
                           g->pages_sharing);
        }
        if (r->stats.pages_merged_within + r->stats.pages_merged_between !=
            r->stats.pages_merged) {
            return not_yet(e, "member %u: within and between", i);
        }
        /* the kernel says the same of what is merged */
        if (r->view.segment_pages - r->view.copied !=
            r->stats.pages_merged) {
            return not_yet(e, "member %u: %" G_GUINT64_FORMAT " merged, %"
                           G_GUINT64_FORMAT " mapped", i,
                           r->stats.pages_merged, r->view.segment_pages);
        }
        merged += r->stats.pages_merged;
        own += r->view.own_pages;
        /* only segments that it uses are held */
        if (r->segments.pages > r->view.distinct) {
            return not_yet(e, "member %u holds %" G_GUINT64_FORMAT
                           " segment pages", i, r->segments.pages);
        }
    }
    return (merged == e->shared + e->sharing && own == e->own) ||
           not_yet(e, "%" G_GUINT64_FORMAT " merged, %" G_GUINT64_FORMAT
                   " own", merged, own);
}

static void expect(Expected *e, const char *round, uint64_t shared,
                   uint64_t sharing, uint64_t own)
{
    gint64 end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;

    e->shared = shared;
    e->sharing = sharing;
    e->own = own;
    while (!as_computed(e)) {
        if (g_get_monotonic_time() > end) {
            fx_fail("counters wrong", "%s: %s, expected shared %"
                    G_GUINT64_FORMAT ", sharing %" G_GUINT64_FORMAT, round,
                    e->why, shared, sharing);
        }
        g_usleep(10000);
    }
}

static void fill(Expected *e, unsigned member, char content)
{
    tell(&e->members[member], FILL, content, &e->report[member]);
}

static void settle(Expected *e)
{
    for (unsigned i = 0; i < MEMBERS; i++) {
        tell(&e->members[i], SETTLE, 0, &e->report[i]);
    }
}

static void quit(Member *m)
{
    Order order = { .command = QUIT };
    int status;

    g_assert_cmpint(send(m->sock, &order, sizeof(order), 0), ==,
                    sizeof(order));
    g_assert_cmpint(waitpid(m->pid, &status, 0), ==, m->pid);
    g_assert_cmpint(status, ==, 0);
    close(m->sock);
}

static void test_rounds(gconstpointer data)
{
    const FxKind *kinds = data;
    Member members[MEMBERS];
    Expected e = { .members = members };
    char *dir = fx_group_dir();
    uint64_t n = PAGES;

    for (unsigned i = 0; i < MEMBERS; i++) {
        member_start(&members[i], kinds[i], dir);
    }
    /* two that fill at once may publish the same page twice: in turn */
    fill(&e, 0, 'c');
    fill(&e, 1, 'a');
    fill(&e, 2, 'a');
    expect(&e, "c,a,a", 2, 3 * n - 2, 0);
    g_assert_cmpuint(e.report[0].stats.pages_merged_between, ==, 0);
    g_assert_cmpuint(e.report[1].stats.pages_merged_between, ==, n);
    g_assert_cmpuint(e.report[2].stats.pages_merged_between, ==, n);

    fill(&e, 1, 'b');
    expect(&e, "c,b,a", 3, 3 * n - 3, 0);
    for (unsigned i = 0; i < MEMBERS; i++) {
        g_assert_cmpuint(e.report[i].stats.pages_merged_within, ==, n);
    }

    for (unsigned i = 0; i < MEMBERS; i++) {
        fill(&e, i, 'd');
    }
    expect(&e, "d,d,d", 1, 3 * n - 1, 0);
    for (unsigned i = 0; i < MEMBERS; i++) {
        g_assert_cmpuint(e.report[i].stats.pages_merged_between, ==, n);
    }

    tell(&members[2], ONE_PAGE, 'e', &e.report[2]);
    settle(&e);
    expect(&e, "d,d,d but e", 1, 3 * n - 2, 1);
    g_assert_cmpuint(e.report[2].stats.pages_merged, ==, n - 1);
    g_assert_cmpuint(e.report[2].stats.pass.unshared, ==, 1);
    g_assert_cmpuint(e.report[2].stats.cow_breaks, >=, 1);

    for (unsigned i = 0; i < MEMBERS; i++) {
        quit(&members[i]);
    }
    fx_group_dir_free(dir);
    g_free(e.why);
}

/* The publisher is killed: the others keep their bytes, and go on merging. */
static void test_killed(gconstpointer data)
{
    const FxKind *kinds = data;
    Member members[MEMBERS];
    Expected e = { .members = members };
    char *dir = fx_group_dir();
    uint64_t n = PAGES;
    int status;

    for (unsigned i = 0; i < MEMBERS; i++) {
        member_start(&members[i], kinds[i], dir);
        fill(&e, i, 'k');
    }
    expect(&e, "k,k,k", 1, 3 * n - 1, 0);
    kill(members[0].pid, SIGKILL);
    g_assert_cmpint(waitpid(members[0].pid, &status, 0), ==, members[0].pid);
    close(members[0].sock);
    /* the newcomer gets the segment from who still has it */
    member_start(&members[0], kinds[0], dir);
    fill(&e, 0, 'k');
    expect(&e, "killed", 1, 3 * n - 1, 0);
    fill(&e, 1, 'm');
    fill(&e, 2, 'm');
    fill(&e, 0, 'm');
    expect(&e, "new contents", 1, 3 * n - 1, 0);
    for (unsigned i = 0; i < MEMBERS; i++) {
        quit(&members[i]);
    }
    fx_group_dir_free(dir);
    g_free(e.why);
}

/* ---- the thief ---- */

#define VICTIMS 2

static void has_none(void *opaque, DedupOwnPage *pages, unsigned n,
                     const uint8_t *secret)
{
}

static int gives_none(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    return -1;
}

static bool note_gid(void *opaque, uint32_t gid, unsigned npages,
                     bool ours, const DedupSegmentUse *own,
                     const DedupSegmentUse *others)
{
    g_array_append_val((GArray *)opaque, gid);
    return true;
}

static bool is_content(const void *page, uint64_t seed)
{
    uint64_t content[FX_PAGE / sizeof(uint64_t)];

    fx_content(content, seed);
    return memcmp(page, content, FX_PAGE) == 0;
}

/* What of the victims is in a segment that the thief got. */
typedef struct Loot {
    unsigned segments;
    unsigned common;
    unsigned own[VICTIMS];
    unsigned publisher;         /* of the last one */
    uint32_t gid;
    uint32_t page;
} Loot;

static void look_into(int fd, unsigned npages, Loot *loot)
{
    for (unsigned p = 0; p < npages; p++) {
        uint8_t page[FX_PAGE];

        g_assert_cmpint(pread(fd, page, FX_PAGE, (off_t)p * FX_PAGE), ==,
                        FX_PAGE);
        for (unsigned i = 0; i < PAGES; i++) {
            if (i >= PAGES / 2) {
                loot->common += is_content(page, COMMON_SEED(i));
                continue;
            }
            for (unsigned v = 0; i % 2 == 0 && v < VICTIMS; v++) {
                loot->own[v] += is_content(page, OWN_SEED(v + 1, i));
            }
        }
    }
}

/* Ask for every page of every segment, with this content as the proof. */
static Loot steal(DedupGroup *g, const GArray *gids, uint64_t seed)
{
    uint8_t content[FX_PAGE];
    Loot loot = { 0 };

    fx_content(content, seed);
    dedup_group_refresh(g);
    for (unsigned i = 0; i < gids->len; i++) {
        uint32_t gid = g_array_index(gids, uint32_t, i);
        unsigned publisher, npages;

        if (!dedup_group_segment_lookup(g, gid, &publisher, &npages)) {
            continue;
        }
        /* and one that it has not */
        for (unsigned p = 0; p <= npages; p++) {
            DedupFetch item = { .gid = gid, .page = p, .content = content };

            dedup_group_fetch(g, publisher, &item, 1);
            if (item.fd >= 0) {
                loot.segments++;
                loot.publisher = publisher;
                loot.gid = gid;
                loot.page = p;
                look_into(item.fd, npages, &loot);
                close(item.fd);
            }
        }
    }
    return loot;
}

static void fill_mixed(Member *victims, const FxKind *kinds,
                       const char *dir)
{
    gint64 end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;
    unsigned ready = 0;
    Report report;

    for (unsigned v = 0; v < VICTIMS; v++) {
        member_start(&victims[v], kinds[v], dir);
        tell(&victims[v], MIXED, v + 1, &report);
    }
    while (ready < VICTIMS) {
        ready = 0;
        for (unsigned v = 0; v < VICTIMS; v++) {
            tell(&victims[v], CHECK, 0, &report);
            ready += report.stats.pages_merged == PAGES &&
                     report.stats.pages_merged_between == PAGES / 2;
        }
        if (g_get_monotonic_time() > end) {
            fx_fail("not merged", "%" G_GUINT64_FORMAT " pages, %"
                    G_GUINT64_FORMAT " between", report.stats.pages_merged,
                    report.stats.pages_merged_between);
        }
        g_usleep(10000);
    }
}

/*
 * Who has no page of a victim gets none, whatever segment it asks for.  Who
 * has a page that the victims share gets what they share, and nothing that
 * only one of them has.
 */
static void test_thief(gconstpointer data)
{
    static const DedupGroupOps ops = {
        .keyed_hashes = has_none, .segment_fd = gives_none,
    };
    g_autoptr(GArray) gids = g_array_new(false, false, sizeof(uint32_t));
    Member victims[VICTIMS];
    char *dir = fx_group_dir();
    uint8_t content[FX_PAGE];
    g_autoptr(GError) error = NULL;
    DedupMemberInfo info;
    DedupFetch item;
    DedupGroup *g;
    Loot loot;
    int status;

    fill_mixed(victims, data, dir);
    g = dedup_group_new(dir, &error);
    g_assert_no_error(error);
    dedup_group_join(g, &ops, NULL, &error);
    g_assert_no_error(error);
    dedup_group_enter(g);
    dedup_group_foreach_segment(g, note_gid, gids);
    /* what each victim has of its own, and what they share */
    g_assert_cmpuint(gids->len, >=, VICTIMS + 1);

    loot = steal(g, gids, 0);
    g_assert_cmpuint(loot.segments, ==, 0);
    loot = steal(g, gids, 0xbad);
    g_assert_cmpuint(loot.segments, ==, 0);

    /* a victim's own page: what remains is that its segment shows others */
    loot = steal(g, gids, OWN_SEED(1, 6));
    g_assert_cmpuint(loot.segments, ==, 1);
    g_assert_cmpuint(loot.own[0], >=, 1);
    g_assert_cmpuint(loot.own[1], ==, 0);
    g_assert_cmpuint(loot.common, ==, 0);

    loot = steal(g, gids, COMMON_SEED(PAGES - 3));
    g_assert_cmpuint(loot.segments, ==, 1);
    g_assert_cmpuint(loot.common, >=, 1);
    g_assert_cmpuint(loot.own[0], ==, 0);
    g_assert_cmpuint(loot.own[1], ==, 0);

    /* the publisher is killed: the other one gives it, for the same proof */
    g_assert_true(dedup_group_member(g, loot.publisher, &info));
    for (unsigned v = 0; v < VICTIMS; v++) {
        if (victims[v].pid == info.pid) {
            kill(victims[v].pid, SIGKILL);
            g_assert_cmpint(waitpid(victims[v].pid, &status, 0), ==,
                            victims[v].pid);
            close(victims[v].sock);
        }
    }
    dedup_group_refresh(g);
    g_assert_false(dedup_group_alive(g, loot.publisher));
    g_assert_cmpuint(dedup_group_members(g), ==, VICTIMS);
    fx_content(content, COMMON_SEED(PAGES - 3));
    item = (DedupFetch) {
        .gid = loot.gid, .page = loot.page, .content = content,
    };
    dedup_group_fetch(g, loot.publisher, &item, 1);
    g_assert_cmpint(item.fd, >=, 0);
    close(item.fd);
    content[17] ^= 1;
    dedup_group_fetch(g, loot.publisher, &item, 1);
    g_assert_cmpint(item.fd, ==, -1);

    for (unsigned v = 0; v < VICTIMS; v++) {
        if (victims[v].pid != info.pid) {
            quit(&victims[v]);
        }
    }
    dedup_group_free(g);
    fx_group_dir_free(dir);
}

int main(int argc, char **argv)
{
    static const FxKind anon[] = { FX_ANON, FX_ANON, FX_ANON };
    static const FxKind mixed[] = { FX_TMPFS, FX_ANON, FX_PRIVATE };

    fx_init(&argc, &argv);
    g_test_add_data_func("/members/rounds/anon", anon, test_rounds);
    g_test_add_data_func("/members/rounds/mixed", mixed, test_rounds);
    g_test_add_data_func("/members/killed/mixed", mixed, test_killed);
    g_test_add_data_func("/members/thief/anon", anon, test_thief);
    g_test_add_data_func("/members/thief/mixed", mixed, test_thief);
    return g_test_run();
}
