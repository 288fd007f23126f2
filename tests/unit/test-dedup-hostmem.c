/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of what the engine reads about the host, on files of our own: memory
 * cgroups of version 1, 2 and both, whatever the host that we run on has; and
 * of what it makes of that beside the other members of its group (room.c).
 *
 * A case is a /proc with "self/cgroup" and "self/mountinfo", and the files of
 * the cgroups that they name.  "@" in the text stands for the directory.
 */

#include <fcntl.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "group-util.h"
#include "scan/room.h"
#include "space/space-internal.h"

#define MIB (1ULL << 20)
#define NO_LIMIT UINT64_MAX
#define U64 "%" G_GUINT64_FORMAT

typedef struct Host {
    char *dir;
    DedupHostMem *mem;
} Host;

static void put(Host *h, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(h->dir, name, NULL);
    g_autofree char *parent = g_path_get_dirname(path);
    g_autoptr(GString) s = g_string_new(text);
    int fd;

    g_string_replace(s, "@", h->dir, 0);
    g_assert_cmpint(g_mkdir_with_parents(parent, 0700), ==, 0);
    /* in place: the engine keeps some of them open */
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(write(fd, s->str, s->len), ==, s->len);
    close(fd);
}

/* One cgroup of version 2; @limit as in memory.max. */
static void put_v2(Host *h, const char *name, const char *limit,
                   uint64_t current, uint64_t file)
{
    g_autofree char *max = g_strconcat(name, "/memory.max", NULL);
    g_autofree char *now = g_strconcat(name, "/memory.current", NULL);
    g_autofree char *stat = g_strconcat(name, "/memory.stat", NULL);
    g_autofree char *now_text = g_strdup_printf(U64 "\n", current);
    g_autofree char *stat_text = g_strdup_printf(
        "anon 1\nfile " U64 "\nshmem 4096\ninactive_anon 7\nactive_anon 7\n"
        "inactive_file " U64 "\nactive_file " U64 "\n",
        9 * file, file / 4, file - file / 4);

    put(h, max, limit);
    put(h, now, now_text);
    put(h, stat, stat_text);
}

static void put_v1(Host *h, const char *name, const char *limit,
                   uint64_t usage, uint64_t file)
{
    g_autofree char *max = g_strconcat(name, "/memory.limit_in_bytes", NULL);
    g_autofree char *now = g_strconcat(name, "/memory.usage_in_bytes", NULL);
    g_autofree char *stat = g_strconcat(name, "/memory.stat", NULL);
    g_autofree char *now_text = g_strdup_printf(U64 "\n", usage);
    /* without its children, and with them */
    g_autofree char *stat_text = g_strdup_printf(
        "cache 1\ninactive_file 1\nactive_file 1\n"
        "total_inactive_file " U64 "\ntotal_active_file " U64 "\n",
        file / 4, file - file / 4);

    put(h, max, limit);
    put(h, now, now_text);
    put(h, stat, stat_text);
}

#define MOUNT_V2 "29 23 0:25 / @/cg rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
#define MOUNT_V1 "30 23 0:26 / @/cg1 rw shared:10 - cgroup cgroup rw,memory\n"
#define MOUNT_OTHERS \
    "22 28 0:21 / /proc rw,nosuid - proc proc rw\n" \
    "31 23 0:27 / @/cpu rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"

static void host_begin(Host *h)
{
    h->dir = test_dir_new();
    put(h, "sys/vm/max_map_count", "262144\n");
    put(h, "meminfo", "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 5 kB\n");
    put(h, "self/maps", "a\nb\nc\n");
}

static void host_start(Host *h, const char *cgroup, const char *mounts)
{
    put(h, "self/cgroup", cgroup);
    put(h, "self/mountinfo", mounts);
    h->mem = dedup_hostmem_new(h->dir);
}

/* The least room, which must be that of the cgroup @binding. */
static uint64_t room(Host *h, const char *binding)
{
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS], least = { 0, NO_LIMIT, 0 };
    unsigned n = dedup_hostmem_cgroup_rooms(h->mem, rooms);
    struct stat st = { 0 };

    for (unsigned i = 0; i < n; i++) {
        least = rooms[i].bytes < least.bytes ? rooms[i] : least;
    }
    if (binding) {
        g_autofree char *path = g_build_filename(h->dir, binding, NULL);

        g_assert_cmpint(stat(path, &st), ==, 0);
    }
    g_assert_cmpuint(least.id, ==, st.st_ino);
    return least.bytes;
}

static void host_end(Host *h)
{
    dedup_hostmem_free(h->mem);
    test_dir_free(h->dir);
}

static void test_v2(void)
{
    Host h;

    host_begin(&h);
    /* the cgroup of the machine has a limit, so has the slice above it */
    put_v2(&h, "cg/machine.slice/vm1", "1073741824\n", 600 * MIB, 100 * MIB);
    put_v2(&h, "cg/machine.slice", "4294967296\n", 1000 * MIB, 0);
    host_start(&h, "0::/machine.slice/vm1\n", MOUNT_OTHERS MOUNT_V2);
    g_assert_cmpuint(room(&h, "cg/machine.slice/vm1"), ==, 524 * MIB);
    /* others of the slice grow: now that is what binds */
    put_v2(&h, "cg/machine.slice", "4294967296\n", 4000 * MIB, 200 * MIB);
    g_assert_cmpuint(room(&h, "cg/machine.slice"), ==, 296 * MIB);
    /* above the limit there is no room, not a huge one */
    put_v2(&h, "cg/machine.slice/vm1", "1048576\n", 2 * MIB, 0);
    g_assert_cmpuint(room(&h, "cg/machine.slice/vm1"), ==, 0);
    put_v2(&h, "cg/machine.slice/vm1", "max\n", 600 * MIB, 0);
    put_v2(&h, "cg/machine.slice", "max\n", 4000 * MIB, 0);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    g_assert_cmpuint(dedup_hostmem_max_maps(h.mem), ==, 262144);
    put(&h, "sys/vm/max_map_count", "65530\n");
    g_assert_cmpuint(dedup_hostmem_max_maps(h.mem), ==, 65530);
    g_assert_cmpuint(dedup_hostmem_maps(h.mem), ==, 3);
    g_assert_cmpuint(dedup_hostmem_available(h.mem), ==, 5 * 1024);
    host_end(&h);
}

/* In a container: its part of the hierarchy is mounted as if it were all. */
static void test_v2_container(void)
{
    Host h;

    host_begin(&h);
    put_v2(&h, "cg", "268435456\n", 56 * MIB, 0);
    put_v2(&h, "cg/vm", "max\n", 56 * MIB, 0);
    host_start(&h, "0::/pods/p1/vm\n",
               "29 23 0:25 /pods/p1 @/cg rw - cgroup2 cgroup2 rw\n");
    g_assert_cmpuint(room(&h, "cg"), ==, 200 * MIB);
    dedup_hostmem_free(h.mem);
    /* a cgroup namespace */
    host_start(&h, "0::/vm\n", MOUNT_V2);
    g_assert_cmpuint(room(&h, "cg"), ==, 200 * MIB);
    dedup_hostmem_free(h.mem);
    /* one whose name only begins like it is not below it */
    host_start(&h, "0::/pods/p1vm\n",
               "29 23 0:25 /pods/p1 @/cg rw - cgroup2 cgroup2 rw\n");
    g_assert_cmpuint(room(&h, "cg"), ==, 200 * MIB);
    host_end(&h);
}

static void test_v1(void)
{
    Host h;

    host_begin(&h);
    put_v1(&h, "cg1/machine/vm1", "1073741824\n", 600 * MIB, 100 * MIB);
    put_v1(&h, "cg1/machine", "9223372036854771712\n", 1000 * MIB, 0);
    put_v1(&h, "cg1", "9223372036854771712\n", 2000 * MIB, 0);
    host_start(&h, "5:cpu,cpuacct:/x\n4:memory:/machine/vm1\n0::/y\n",
               MOUNT_OTHERS MOUNT_V1 MOUNT_V2);
    g_assert_cmpuint(room(&h, "cg1/machine/vm1"), ==, 524 * MIB);
    put_v1(&h, "cg1/machine/vm1", "9223372036854771712\n", 600 * MIB, 0);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    host_end(&h);
}

/* Version 1 for some controllers; memory is with version 2. */
static void test_hybrid(void)
{
    Host h;

    host_begin(&h);
    put_v2(&h, "cg/vm1", "1073741824\n", 600 * MIB, 0);
    host_start(&h, "5:cpu,cpuacct:/x\n0::/vm1\n", MOUNT_OTHERS MOUNT_V2);
    g_assert_cmpuint(room(&h, "cg/vm1"), ==, 424 * MIB);
    host_end(&h);
}

static void test_none(void)
{
    Host h;

    host_begin(&h);
    host_start(&h, "5:cpu,cpuacct:/x\n", MOUNT_OTHERS);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    dedup_hostmem_free(h.mem);
    /* version 2 is there, without the memory controller */
    put(&h, "cg/vm1/cgroup.procs", "1\n");
    host_start(&h, "0::/vm1\n", MOUNT_V2);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    dedup_hostmem_free(h.mem);
    h.mem = dedup_hostmem_new("/nonexistent");
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    g_assert_cmpuint(dedup_hostmem_available(h.mem), ==, UINT64_MAX);
    g_assert_cmpuint(dedup_hostmem_maps(h.mem), ==, 0);
    g_assert_cmpuint(dedup_hostmem_max_maps(h.mem), ==, 65530);
    host_end(&h);
}

/* Moved to another cgroup, as libvirt and Kata do after the start. */
static void test_moved(void)
{
    uint64_t ids[DEDUP_CGROUP_IDS];
    Host h;

    host_begin(&h);
    put_v2(&h, "cg/early", "max\n", 600 * MIB, 0);
    put_v2(&h, "cg/slice/vm1", "max\n", 600 * MIB, 0);
    put_v2(&h, "cg/slice", "1073741824\n", 600 * MIB, 0);
    host_start(&h, "0::/early\n", MOUNT_V2);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    put(&h, "self/cgroup", "0::/slice/vm1\n");
    g_assert_cmpuint(room(&h, "cg/slice"), ==, 424 * MIB);
    dedup_hostmem_cgroup_ids(h.mem, ids);
    g_assert_cmpuint(ids[2], !=, 0);       /* vm1, slice, the mount point */
    g_assert_cmpuint(ids[3], ==, 0);
    /* and back */
    put(&h, "self/cgroup", "0::/early\n");
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    /* the cgroup is gone, the one above it counts */
    put(&h, "self/cgroup", "0::/slice/gone\n");
    g_assert_cmpuint(room(&h, "cg/slice"), ==, 424 * MIB);
    dedup_hostmem_free(h.mem);

    put_v1(&h, "cg1/early", "9223372036854771712\n", 600 * MIB, 0);
    put_v1(&h, "cg1/vm1", "1073741824\n", 600 * MIB, 0);
    host_start(&h, "5:cpu,cpuacct:/x\n4:memory:/early\n", MOUNT_V1);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    put(&h, "self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/vm1\n");
    g_assert_cmpuint(room(&h, "cg1/vm1"), ==, 424 * MIB);
    host_end(&h);
}

/* Out of descriptors a limit cannot be read: that is not "no limit". */
static void test_no_descriptors(void)
{
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS] = { 0 };
    struct rlimit old, none;
    unsigned n;
    Host h;

    host_begin(&h);
    put_v2(&h, "cg/vm1", "1073741824\n", 600 * MIB, 0);
    host_start(&h, "0::/vm1\n", MOUNT_V2);
    g_assert_cmpint(getrlimit(RLIMIT_NOFILE, &old), ==, 0);
    none = old;
    none.rlim_cur = 0;
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &none), ==, 0);
    n = dedup_hostmem_cgroup_rooms(h.mem, rooms);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &old), ==, 0);
    g_assert_cmpuint(n, >=, 1);
    g_assert_cmpuint(rooms[0].bytes, ==, 0);
    g_assert_cmpuint(room(&h, "cg/vm1"), ==, 424 * MIB);
    /* moved at that moment */
    put(&h, "self/cgroup", "0::/vm2\n");
    put_v2(&h, "cg/vm2", "max\n", 600 * MIB, 0);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &none), ==, 0);
    n = dedup_hostmem_cgroup_rooms(h.mem, rooms);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &old), ==, 0);
    g_assert_cmpuint(n, >=, 1);
    g_assert_cmpuint(rooms[n - 1].bytes, ==, 0);
    g_assert_cmpuint(room(&h, NULL), ==, NO_LIMIT);
    host_end(&h);
}

/*
 * Members in cgroups of their own below one slice: what they are owed, and
 * what they reserved, is taken off the slice's room, not off each other's.
 */
static void test_members(TestPair *f, gconstpointer data)
{
    DedupRoom r = { .group = f->a->g };
    DedupMemberInfo b = { .owed_bytes = 300 * MIB, .reserved_bytes = 50 * MIB };
    struct stat st;
    g_autofree char *slice = NULL;
    Host h;

    host_begin(&h);
    put_v2(&h, "cg/slice/a", "1073741824\n", 24 * MIB, 0);
    put_v2(&h, "cg/slice", "1073741824\n", 124 * MIB, 0);
    host_start(&h, "0::/slice/a\n", MOUNT_V2);
    r.hostmem = h.mem;
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_GROWTH), ==, 900 * MIB);

    slice = g_build_filename(h.dir, "cg/slice", NULL);
    g_assert_cmpint(stat(slice, &st), ==, 0);
    b.cgroups[0] = st.st_ino + 1000000;    /* slice/b */
    b.cgroups[1] = st.st_ino;
    g_assert_true(dedup_group_tell(f->b->g, &b));
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_GROWTH), ==, 600 * MIB);
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_RESERVED), ==,
                     850 * MIB);
    /* it may publish, too, before we look again */
    b.scanning = 1;
    g_assert_true(dedup_group_tell(f->b->g, &b));
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_GROWTH), ==,
                     600 * MIB - DEDUP_PUBLISH_BYTES);
    /* somewhere else */
    b.cgroups[1] = 0;
    g_assert_true(dedup_group_tell(f->b->g, &b));
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_GROWTH), ==, 900 * MIB);
    /* what a liar says cannot overflow */
    b.cgroups[1] = st.st_ino;
    b.owed_bytes = UINT64_MAX;
    g_assert_true(dedup_group_tell(f->b->g, &b));
    g_assert_cmpuint(dedup_cgroup_room(&r, DEDUP_OWED_GROWTH), ==, 0);
    host_end(&h);
}

/* What has no memory of its own; more than all has, never. */
static void test_owed(void)
{
    DedupSpace space = { .sums = { .total = 1000, .own = 900 } };
    DedupRoom room = { .space = &space };
    uint64_t beside = 64 * MIB;

    g_assert_cmpuint(dedup_owed_bytes(&room), ==, 100 * DEDUP_PAGE_SIZE);
    space.sums.own = 1100;
    g_assert_cmpuint(dedup_owed_bytes(&room), ==, 0);
    space.sums.own = 0;
    g_assert_cmpuint(dedup_owed_bytes(&room), ==, 1000 * DEDUP_PAGE_SIZE);
    /* what devices may take beside it */
    room.beside = &beside;
    g_assert_cmpuint(dedup_owed_bytes(&room), ==,
                     1000 * DEDUP_PAGE_SIZE + 64 * MIB);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/hostmem/v2", test_v2);
    g_test_add_func("/hostmem/v2-container", test_v2_container);
    g_test_add_func("/hostmem/v1", test_v1);
    g_test_add_func("/hostmem/hybrid", test_hybrid);
    g_test_add_func("/hostmem/none", test_none);
    g_test_add_func("/hostmem/moved", test_moved);
    g_test_add_func("/hostmem/no-descriptors", test_no_descriptors);
    test_pair_add("/hostmem/members", test_members);
    g_test_add_func("/hostmem/owed", test_owed);
    return g_test_run();
}
