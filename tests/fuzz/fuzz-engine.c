/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: two engines whose guests have equal pages, and an enemy in their
 * group.
 *
 * An input is a sequence of stores of the guests, passes of the scanners, and
 * what the enemy does: it knows all that the guests have, so it proves what it
 * likes; it gives out segments with the right contents and with others, names
 * them in the table, and leads the engines there by hints, or anywhere else; it
 * writes the slots, the table and the rows of the others.
 *
 * After each pass every byte of both guests is right, and again when all was
 * given back.  The engines' scanners are stepped here, on the one thread; the
 * answers come from the members' own.
 */

#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "fuzz-file.h"
#include "group/group-internal.h"
#include "host/mutant.h"
#include "index/index-table.h"
#include "space/answer.h"
#include "space/holdings.h"
#include "space/space-internal.h"

#define PAGES 64
/* Contents that the guests have: few, so that they meet. */
#define SEEDS 24
#define SEGMENTS 8

typedef struct Guest {
    FxEngine *fe;
    FxRam *ram;
} Guest;

/* What the enemy gives for a segment of any name, by the name. */
typedef struct Gift {
    int fd;
    uint8_t seeds[16];          /* of the pages that it says are there */
} Gift;

static Guest guests[2];
static DedupGroup *enemy;
static Gift gifts[SEGMENTS];

/* ---- the enemy ---- */

/* It has whatever it is asked for: it is told the page's number only. */
static void prove_all(void *opaque, DedupOwnPage *pages, unsigned n,
                      const uint8_t *secret)
{
    for (unsigned i = 0; i < n; i++) {
        uint8_t page[DEDUP_PAGE_SIZE];

        fx_content(page, pages[i].page % SEEDS);
        pages[i].is_there = dedup_page_keyed_hash(page, secret,
                                                  &pages[i].hash);
    }
}

static int give(void *opaque, uint32_t gid, uint32_t page,
                const uint8_t *secret, DedupHash128 *hash)
{
    const Gift *gift = &gifts[gid % SEGMENTS];
    uint8_t content[DEDUP_PAGE_SIZE];

    fx_content(content, gift->seeds[page % sizeof(gift->seeds)] % SEEDS);
    dedup_page_keyed_hash(content, secret, hash);
    return gift->fd < 0 ? -1 : fcntl(gift->fd, F_DUPFD_CLOEXEC, 0);
}

static const DedupGroupOps enemy_ops = {
    .keyed_hashes = prove_all, .segment_fd = give,
};

/* A sealed segment: of each page the input says what it is in truth. */
static int any_segment(FuzzInput *in, Gift *gift, unsigned *npages)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[DEDUP_PAGE_SIZE];

    *npages = 1 + fuzz_u8(in) % sizeof(gift->seeds);
    for (unsigned i = 0; i < *npages; i++) {
        unsigned truth = fuzz_u8(in);

        gift->seeds[i] = truth & 31;
        fx_content(page, (truth & 31) % SEEDS);
        /* one byte is not as it says */
        page[truth * 41 % sizeof(page)] ^= truth >> 7;
        g_assert_cmpint(write(fd, page, sizeof(page)), ==, sizeof(page));
    }
    fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW |
          F_SEAL_WRITE);
    return fd;
}

/* A name in the table, for a gift; the publisher may be anybody. */
static void name_gift(FuzzInput *in, unsigned npages)
{
    uint32_t slot = fuzz_u8(in) % 16;
    DedupTableEntry e = {
        .gid = (1 + fuzz_u8(in) % 4) * DEDUP_MAX_SEGMENTS + slot,
        .npages = npages,
        .member = fuzz_u8(in) % 4,
        .incarnation = enemy->incarnation,
    };
    uint32_t extent = 16;

    dedup_group_file_write(&enemy->file, &e, sizeof(e),
                           DEDUP_FILE_TABLE + slot * sizeof(e));
    dedup_group_file_write(&enemy->file, &extent, sizeof(extent),
                           offsetof(DedupFileHeader, segments));
}

static void make_gift(FuzzInput *in)
{
    Gift *gift = &gifts[fuzz_u8(in) % SEGMENTS];
    unsigned npages;

    if (gift->fd >= 0) {
        close(gift->fd);
    }
    gift->fd = fuzz_u8(in) & 7 ? any_segment(in, gift, &npages)
                               : fuzz_file(in, &npages);
    name_gift(in, npages);
}

/* A hint for contents that a guest may have; it leads anywhere. */
static void lead(FuzzInput *in)
{
    DedupHint hint = { .kind = 1 + fuzz_u8(in) % 3 }, hits[DEDUP_INDEX_HITS];
    uint8_t page[DEDUP_PAGE_SIZE];
    unsigned where = fuzz_u8(in);
    uint64_t hash;

    fx_content(page, fuzz_u8(in) % SEEDS);
    hash = dedup_page_hash(page, dedup_group_salt(enemy));
    if (hint.kind == DEDUP_HINT_PUBLISHED) {
        hint.where = (1 + where / 16 % 4) * DEDUP_MAX_SEGMENTS + where % 16;
        hint.page = fuzz_u8(in) + (where & 128 ? 256 : 0);
    } else {
        hint.where = where % 4;
        hint.page = where & 128 ? fuzz_u32(in) % (1u << 30)
                                : fuzz_u8(in) % (2 * PAGES);
    }
    if (where & 64 && dedup_index_lookup(enemy->file.index, hash, hits)) {
        dedup_index_replace(enemy->file.index, hash, &hits[0], &hint);
    } else {
        dedup_index_insert(enemy->file.index, hash, &hint);
    }
}

/* What others have said is changed. */
static void forge(FuzzInput *in)
{
    unsigned where = fuzz_u8(in), unit = fuzz_u8(in);
    uint8_t data[8];
    uint64_t at;

    fuzz_bytes(in, data, sizeof(data));
    switch (where % 4) {
    case 0:
        at = DEDUP_FILE_SLOTS + (unit * 8) % (3 * sizeof(DedupSlot));
        break;
    case 1:
        at = DEDUP_FILE_TABLE + (unit * 4) % (16 * sizeof(DedupTableEntry));
        break;
    case 2:
        at = DEDUP_FILE_USE + where / 4 % 3 * DEDUP_FILE_ROW + unit * 4;
        break;
    default:
        at = DEDUP_FILE_INDEX_HEADER + unit % SHARDS * sizeof(Shard) +
             where / 4 % 3 * 8;
    }
    dedup_group_file_write(&enemy->file, data, 1 + where / 16 % 8, at);
}

/* ---- the guests ---- */

static void store(FuzzInput *in, FxRam *ram)
{
    unsigned how = fuzz_u8(in);
    unsigned page = fuzz_u8(in) % PAGES;

    if (how & 128) {
        fx_byte(ram, page, how * 31 % FX_PAGE, how);
        return;
    }
    for (unsigned i = 0; i < 1 + how / 8 % 16 && page + i < PAGES; i++) {
        fx_page(ram, page + i, (how + i) % SEEDS);
    }
}

static void check(void)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(guests); i++) {
        fx_assert_bytes(guests[i].ram);
    }
}

/* ---- the engines ---- */

static void keyed_hashes(void *opaque, DedupOwnPage *pages, unsigned n,
                         const uint8_t *secret)
{
    dedup_space_keyed_hashes(((DedupEngine *)opaque)->space, pages, n,
                             secret);
}

static int segment_fd(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    return dedup_holding_fd(((DedupEngine *)opaque)->space, gid, page, secret,
                            hash);
}

static const DedupGroupOps engine_ops = {
    .keyed_hashes = keyed_hashes, .segment_fd = segment_fd,
};

/* What the loop in engine.c does, once around. */
static void pass(DedupEngine *e, bool keep)
{
    DedupTally tally;

    while (!dedup_scan_batch(e->scan, &e->control.params, 1u << 20)) {
        continue;
    }
    dedup_scan_end_pass(e->scan, &tally);
    dedup_figures_pass(&e->figures, &tally);
    if (keep) {
        dedup_figures_batch(&e->figures, true);
        dedup_scan_upkeep(e->scan);
    }
}

static void step(FuzzInput *in)
{
    unsigned op = fuzz_u8(in);
    Guest *g = &guests[op >> 3 & 1];

    switch (op % 8) {
    case 0:
    case 1:
        store(in, g->ram);
        break;
    case 2:
    case 3:
        pass(g->fe->e, op & 16);
        check();
        break;
    case 4:
        make_gift(in);
        break;
    case 5:
        lead(in);
        break;
    case 6:
        forge(in);
        break;
    default:
        dedup_group_refresh(enemy);
    }
}

static void start_guest(Guest *g, FxKind kind, const char *dir)
{
    g_autoptr(GError) error = NULL;

    g->ram = fx_ram_new(kind, PAGES);
    for (unsigned i = 0; i < PAGES; i++) {
        fx_page(g->ram, i, i % SEEDS);
    }
    g->fe = fx_engine_new(dir);
    fx_add(g->fe, g->ram);
    dedup_figures_begin_thread(&g->fe->e->figures);
    dedup_space_set_scanner(g->fe->e->space, NULL);
    /* the threads of those that are there may be late on a busy host */
    while (!dedup_scan_join(g->fe->e->scan, &engine_ops, g->fe->e, &error)) {
        g_clear_error(&error);
    }
}

static void end_guest(Guest *g)
{
    g_autoptr(GError) error = NULL;

    dedup_scan_abandon(g->fe->e->scan);
    if (!dedup_region_remove(g->ram->region, true, &error)) {
        g_error("%s", error->message);
    }
    fx_assert_bytes(g->ram);
    dedup_space_reap(g->fe->e->space);
    dedup_figures_end_thread(&g->fe->e->figures);
    fx_engine_free(g->fe);
    g->ram->region = NULL;
    fx_ram_free(g->ram);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    dedup_never_rests = true;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const FxKind kinds[] = { FX_MEMFD, FX_ANON, FX_PRIVATE };
    FuzzInput in = { .at = data, .left = size };
    g_autoptr(GError) error = NULL;
    int lowest = fuzz_lowest_fd();
    char *dir = fx_group_dir();
    unsigned kind = fuzz_u8(&in);

    for (unsigned i = 0; i < SEGMENTS; i++) {
        gifts[i] = (Gift) { .fd = -1 };
    }
    start_guest(&guests[0], kinds[kind % 3], dir);
    start_guest(&guests[1], kinds[kind / 3 % 3], dir);
    enemy = dedup_group_new(dir, &error);
    while (!dedup_group_join(enemy, &enemy_ops, NULL, &error)) {
        g_clear_error(&error);
    }
    dedup_group_enter(enemy);
    while (in.left) {
        step(&in);
    }
    pass(guests[0].fe->e, true);
    pass(guests[1].fe->e, true);
    check();
    dedup_group_free(enemy);
    end_guest(&guests[0]);
    end_guest(&guests[1]);
    for (unsigned i = 0; i < SEGMENTS; i++) {
        if (gifts[i].fd >= 0) {
            close(gifts[i].fd);
        }
    }
    fx_group_dir_free(dir);
    g_assert_cmpint(fuzz_lowest_fd(), ==, lowest);
    return 0;
}
