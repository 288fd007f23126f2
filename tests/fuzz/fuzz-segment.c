/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: descriptors that are said to be a segment's, or the shared file's.
 *
 * What is taken for a segment never changes, whatever is done to its file by
 * who kept a descriptor (I2), and can be read to its end.
 */

#include "fuzz-file.h"
#include "group/group-internal.h"

static void check_segment(FuzzInput *in, int fd, int kept, unsigned npages)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s = dedup_segment_accept(fd, 1, npages, &error);
    g_autofree uint8_t *before = NULL;
    size_t size;

    g_assert_true(!s == (error != NULL));
    if (!s) {
        return;
    }
    g_assert_cmpuint(s->npages, ==, npages);
    size = (size_t)npages << DEDUP_PAGE_SHIFT;
    before = g_memdup2(s->map, size);
    while (in->left) {
        fuzz_file_attack(in, kept);
        g_assert_cmpint(memcmp(before, s->map, size), ==, 0);
    }
    /* nor what is not in our page table */
    dedup_segment_tidy(s);
    g_assert_cmpint(memcmp(before, s->map, size), ==, 0);
    dedup_segment_free(s);
}

static void check_shared(FuzzInput *in, int fd, int kept)
{
    g_autoptr(GError) error = NULL;
    DedupGroupFile f = { .fd = -1 };
    bool ok = dedup_group_file_accept(&f, fd, &error);

    g_assert_true(!ok == (error != NULL));
    if (!ok) {
        g_assert_cmpint(f.fd, ==, -1);
        return;
    }
    while (in->left) {
        DedupHint hint = {
            .kind = DEDUP_HINT_CANDIDATE, .page = fuzz_u8(in),
        };

        fuzz_file_attack(in, kept);
        /* no part of it is gone */
        dedup_index_set_limit(f.index, 1000);
        dedup_index_insert(f.index, fuzz_u64(in), &hint);
    }
    dedup_group_file_close(&f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    FuzzInput in = { .at = data, .left = MIN(size, 256) };
    int lowest = fuzz_lowest_fd();
    unsigned how = fuzz_u8(&in);
    unsigned npages;
    int fd = fuzz_file(&in, &npages);
    int kept = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    if (how & 1) {
        check_shared(&in, fd, kept);
    } else {
        /* what the table says of its length may be wrong */
        check_segment(&in, fd, kept, how & 2 ? fuzz_u32(&in) : npages);
    }
    close(kept);
    g_assert_cmpint(fuzz_lowest_fd(), ==, lowest);
    return 0;
}
