/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: the shared file of a group, of which an enemy writes every field:
 * the header, the slots, the table of segments, the rows of use, the index.
 *
 * An input is a sequence of the enemy's writes and of what a member does, one
 * after the other; in some, the enemy writes on from a thread of its own.
 * Numbers that come from there are within their bounds, everything ends, and
 * the file takes no more memory than the index may (I9).
 */

#include <stddef.h>
#include <sys/stat.h>

#include "fuzz-input.h"
#include "group/group-internal.h"
#include "index/index-table.h"

/* What the index may grow to, in entries. */
#define LIMIT 20000
/* A page that is written to takes one; what a member may take, see below. */
#define MOST_PAGES (2 * SHARDS * (LIMIT / SHARDS / PAGE_ENTRIES * 2 + 2) + 64)
/* Members that live, as far as this one knows; itself is 0. */
#define MEMBERS 4

static DedupGroup *group;
static unsigned enemy_pages;    /* that it has written to, about */

/* Hashes that meet: few tags, few shards. */
static uint64_t any_hash(FuzzInput *in)
{
    unsigned x = fuzz_u8(in);

    return x & 0x80 ? fuzz_u64(in)
                    : (uint64_t)(x & 3) << 60 | (uint64_t)(x >> 2 & 7) << 38;
}

static DedupHint any_hint(FuzzInput *in)
{
    DedupHint hint = { .kind = 1 + fuzz_u8(in) % 3 };

    if (hint.kind == DEDUP_HINT_PUBLISHED) {
        hint.where = fuzz_u32(in) % (1u << DEDUP_GID_BITS);
        hint.page = fuzz_u32(in) % (1u << DEDUP_GID_PAGE_BITS);
    } else {
        hint.where = fuzz_u8(in);
        hint.page = fuzz_u32(in) % (1u << DEDUP_MEMBER_PAGE_BITS);
    }
    return hint;
}

/* ---- the enemy ---- */

typedef struct Scribble {
    uint64_t at;                /* in the file */
    uint8_t data[16];
    unsigned n;
} Scribble;

static Scribble any_scribble(FuzzInput *in)
{
    unsigned where = fuzz_u8(in);
    unsigned unit = fuzz_u8(in);
    Scribble s = { .n = 1 + where / 8 % sizeof(s.data) };

    fuzz_bytes(in, s.data, s.n);
    switch (where % 8) {
    case 0:
        s.at = unit % sizeof(DedupFileHeader);
        break;
    case 1:
        s.at = DEDUP_FILE_SLOTS + unit % (MEMBERS * sizeof(DedupSlot));
        break;
    case 2:
    case 3:
        s.at = DEDUP_FILE_TABLE + unit;
        break;
    case 4:
        s.at = DEDUP_FILE_USE + unit % MEMBERS * DEDUP_FILE_ROW + unit / 4;
        break;
    case 5:
        s.at = DEDUP_FILE_INDEX_HEADER + unit / 8 % SHARDS * sizeof(Shard) +
               unit % 8 * 8;
        break;
    case 6:
        s.at = DEDUP_FILE_INDEX +
               (uint64_t)(unit & 3) * SHARD_PAGES * DEDUP_PAGE_SIZE +
               (unit >> 2) * sizeof(uint64_t);
        break;
    default:
        s.at = DEDUP_FILE_INDEX +
               fuzz_u64(in) % (dedup_index_table_size() - sizeof(s.data));
    }
    return s;
}

static void scribble(const Scribble *s)
{
    g_assert_cmpint(pwrite(group->file.fd, s->data, s->n, s->at), ==, s->n);
}

typedef struct Enemy {
    GThread *thread;
    bool stop;                  /* atomic */
    Scribble what[8];
    unsigned n;
} Enemy;

static gpointer enemy_main(gpointer opaque)
{
    Enemy *e = opaque;

    for (unsigned i = 0; !__atomic_load_n(&e->stop, __ATOMIC_RELAXED); i++) {
        scribble(&e->what[i % e->n]);
    }
    return NULL;
}

static void enemy_start(FuzzInput *in, Enemy *e)
{
    if (e->thread) {
        return;
    }
    e->n = 1 + fuzz_u8(in) % G_N_ELEMENTS(e->what);
    for (unsigned i = 0; i < e->n; i++) {
        e->what[i] = any_scribble(in);
    }
    enemy_pages += 2 * e->n;
    e->stop = false;
    e->thread = g_thread_new("enemy", enemy_main, e);
}

static void enemy_end(Enemy *e)
{
    if (e->thread) {
        __atomic_store_n(&e->stop, true, __ATOMIC_RELAXED);
        g_thread_join(e->thread);
        e->thread = NULL;
    }
}

/* ---- a member ---- */

static void look_up(FuzzInput *in)
{
    uint64_t hash = any_hash(in);
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(group->file.index, hash, hits);
    DedupHint hint = any_hint(in);

    g_assert_cmpuint(n, <=, DEDUP_INDEX_HITS);
    for (unsigned i = 0; i < n; i++) {
        bool segment = hits[i].kind == DEDUP_HINT_PUBLISHED;

        g_assert_cmpint(hits[i].kind, !=, DEDUP_HINT_NONE);
        g_assert_cmpuint(hits[i].where, <, 1u << (segment ? DEDUP_GID_BITS
                                                  : DEDUP_MEMBER_BITS));
        g_assert_cmpuint(hits[i].page, <, 1u << (segment ?
                                                 DEDUP_GID_PAGE_BITS :
                                                 DEDUP_MEMBER_PAGE_BITS));
    }
    if (n && hint.page & 1) {
        dedup_index_replace(group->file.index, hash, &hits[0], &hint);
    } else if (n) {
        dedup_index_remove(group->file.index, hash, &hits[n - 1]);
    }
}

static bool is_stale(void *opaque, const DedupHint *hint)
{
    unsigned *calls = opaque;

    return ++*calls % 3 == 0;
}

static void sweep(FuzzInput *in)
{
    uint64_t cursor = fuzz_u64(in);
    unsigned pages = fuzz_u8(in) % 64, calls = 0;

    dedup_index_sweep(group->file.index, &cursor, pages, is_stale, &calls);
    g_assert_cmpuint(calls, <=, pages * PAGE_ENTRIES);
}

static bool on_segment(void *opaque, uint32_t gid, unsigned npages, bool ours,
                       const DedupSegmentUse *own,
                       const DedupSegmentUse *others)
{
    g_assert_cmpuint(gid, <, 1u << DEDUP_GID_BITS);
    g_assert_cmpuint(npages, >, 0);
    g_assert_cmpuint(npages, <=, DEDUP_SEGMENT_PAGES);
    g_assert_cmpuint(own->gid, ==, gid);
    g_assert_cmpuint(others->gid, ==, gid);
    return gid & *(unsigned *)opaque;
}

static void on_member(void *opaque, unsigned member, bool self,
                      const DedupMemberInfo *info)
{
    g_assert_cmpuint(member, <, DEDUP_MAX_MEMBERS);
    g_assert_true(self == (member == group->self));
}

static uint32_t any_gid(FuzzInput *in)
{
    unsigned x = fuzz_u8(in);

    return x & 0x80 ? 1 + fuzz_u32(in) % ((1u << DEDUP_GID_BITS) - 1)
                    : (1 + (x >> 4)) * DEDUP_MAX_SEGMENTS + x % 16;
}

static void use_table(FuzzInput *in, unsigned op)
{
    DedupSegmentUse use = { .gid = any_gid(in), .mapped = 3, .pages = { 7 } };
    unsigned member, npages, mask = fuzz_u8(in);
    uint32_t gid;

    switch (op % 6) {
    case 0:
        gid = dedup_group_segment_alloc(group, 1 + mask % DEDUP_SEGMENT_PAGES);
        g_assert_cmpuint(gid, <, 1u << DEDUP_GID_BITS);
        break;
    case 1:
        if (dedup_group_segment_lookup(group, use.gid, &member, &npages) ==
            DEDUP_LOOKUP_FOUND) {
            g_assert_cmpuint(member, <, DEDUP_MAX_MEMBERS);
            g_assert_cmpuint(npages, >, 0);
            g_assert_cmpuint(npages, <=, DEDUP_SEGMENT_PAGES);
        }
        break;
    case 2:
        dedup_group_segment_release(group, use.gid);
        break;
    case 3:
        dedup_group_tell_use(group, &use);
        enemy_pages += 2;
        break;
    case 4:
        dedup_group_clear_use(group, use.gid);
        dedup_group_others_use(group, use.gid, &use);
        break;
    default:
        dedup_group_foreach_segment(group, on_segment, &mask);
    }
}

static void use_members(FuzzInput *in)
{
    DedupMemberInfo info = { .pid = 1, .pages_total = 5 };
    unsigned member = fuzz_u8(in) % MEMBERS;

    dedup_group_tell(group, &info);
    dedup_group_foreach_member(group, on_member, NULL);
    dedup_group_member(group, member, &info);
    dedup_group_estimates(group, member);
}

static void step(FuzzInput *in, Enemy *enemy)
{
    unsigned op = fuzz_u8(in);
    uint64_t hash, next;
    DedupHint hint;
    Scribble s;

    switch (op % 8) {
    case 0:
    case 1:
        s = any_scribble(in);
        enemy_pages += 2;
        scribble(&s);
        break;
    case 2:
        hint = any_hint(in);
        hash = any_hash(in);
        /* beside each other, or all over the table */
        next = op & 128 ? 0x9e3779b97f4a7c15ull : 1ull << 36;
        for (unsigned i = 0; i < 1 + op / 8; i++) {
            dedup_index_insert(group->file.index, hash + i * next, &hint);
        }
        break;
    case 3:
        look_up(in);
        break;
    case 4:
        use_table(in, op / 8);
        break;
    case 5:
        if (op & 8) {
            use_members(in);
        } else {
            sweep(in);
        }
        break;
    case 6:
        enemy_start(in, enemy);
        break;
    default:
        enemy_end(enemy);
    }
}

static uint64_t file_pages(void)
{
    struct stat st;

    g_assert_cmpint(fstat(group->file.fd, &st), ==, 0);
    return (uint64_t)st.st_blocks / 8;
}

static void join(void)
{
    g_autoptr(GError) error = NULL;
    static const DedupGroupOps ops;

    group = dedup_group_new(NULL, &error);
    g_assert_no_error(error);
    dedup_group_join(group, &ops, NULL, &error);
    g_assert_no_error(error);
    dedup_group_enter(group);
    dedup_index_set_limit(group->file.index, LIMIT);
    /* a group without a directory has nobody else: say that it has */
    for (unsigned k = 1; k < MEMBERS; k++) {
        group->alive[k] = true;
        group->members++;
    }
    enemy_pages = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    FuzzInput in = { .at = data, .left = size };
    int lowest = fuzz_lowest_fd();
    Enemy enemy = { .thread = NULL };

    join();
    while (in.left) {
        step(&in, &enemy);
    }
    enemy_end(&enemy);
    g_assert_cmpuint(file_pages(), <=, MOST_PAGES + enemy_pages);
    dedup_group_free(group);
    g_assert_cmpint(fuzz_lowest_fd(), ==, lowest);
    return 0;
}
