/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of what the engine reads about the host, on files of our own: memory
 * cgroups of version 1, 2 and both, whatever the host that we run on has.
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
#include "hostmem.h"

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

    g_string_replace(s, "@", h->dir, 0);
    g_assert_cmpint(g_mkdir_with_parents(parent, 0700), ==, 0);
    g_assert_true(g_file_set_contents(path, s->str, -1, NULL));
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

static uint64_t room(Host *h, const char *binding)
{
    uint64_t id, bytes = dedup_hostmem_cgroup_room(h->mem, &id);
    struct stat st = { 0 };

    if (binding) {
        g_autofree char *path = g_build_filename(h->dir, binding, NULL);

        g_assert_cmpint(stat(path, &st), ==, 0);
    }
    g_assert_cmpuint(id, ==, st.st_ino);
    return bytes;
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

/* Out of descriptors a limit cannot be read: that is not "no limit". */
static void test_no_descriptors(void)
{
    struct rlimit old, none;
    uint64_t id, bytes;
    Host h;

    host_begin(&h);
    put_v2(&h, "cg/vm1", "1073741824\n", 600 * MIB, 0);
    host_start(&h, "0::/vm1\n", MOUNT_V2);
    g_assert_cmpint(getrlimit(RLIMIT_NOFILE, &old), ==, 0);
    none = old;
    none.rlim_cur = 0;
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &none), ==, 0);
    bytes = dedup_hostmem_cgroup_room(h.mem, &id);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &old), ==, 0);
    g_assert_cmpuint(bytes, ==, 0);
    g_assert_cmpuint(room(&h, "cg/vm1"), ==, 424 * MIB);
    host_end(&h);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/hostmem/v2", test_v2);
    g_test_add_func("/hostmem/v2-container", test_v2_container);
    g_test_add_func("/hostmem/v1", test_v1);
    g_test_add_func("/hostmem/hybrid", test_hybrid);
    g_test_add_func("/hostmem/none", test_none);
    g_test_add_func("/hostmem/no-descriptors", test_no_descriptors);
    return g_test_run();
}
