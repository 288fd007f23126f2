/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The view from outside for the engine's tests: what the kernel says of this
 * process's memory, with no counter of the engine's; see engine-fixture.h.
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

#define PM_PRESENT (1ULL << 63)
#define PM_SWAPPED (1ULL << 62)
#define PM_FILE (1ULL << 61)

static FILE *open_proc(const char *path)
{
    FILE *f = fopen(path, "re");

    if (!f) {
        g_error("%s: %s", path, g_strerror(errno));
    }
    return f;
}

static uint64_t *read_pagemap(const FxRam *ram)
{
    uint64_t *entries = g_new(uint64_t, ram->npages);
    size_t size = ram->npages * sizeof(*entries);
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(pread(fd, entries, size, (uintptr_t)ram->host / FX_PAGE *
                          sizeof(*entries)), ==, size);
    close(fd);
    return entries;
}

static uint64_t file_pages(int fd)
{
    struct stat st;

    g_assert_cmpint(fstat(fd, &st), ==, 0);
    return (uint64_t)st.st_blocks * 512 / FX_PAGE;
}

/* A line of maps or smaps that describes a mapping. */
typedef struct Vma {
    uint64_t start;
    uint64_t end;
    uint64_t offset;
    uint64_t inode;
    bool zeroes;              /* of the segment of zeros */
} Vma;

static bool parse_vma(const char *line, Vma *v)
{
    v->zeroes = strstr(line, "/memfd:dedup-zeroes");
    return sscanf(line, "%" SCNx64 "-%" SCNx64 " %*4s %" SCNx64
                  " %*x:%*x %" SCNu64, &v->start, &v->end, &v->offset,
                  &v->inode) == 4;
}

static bool in_ram(const FxRam *ram, const Vma *v)
{
    uint64_t start = (uintptr_t)ram->host;

    return v->start >= start &&
           v->end <= start + (uint64_t)ram->npages * FX_PAGE;
}

static uint64_t own_inode(const FxRam *ram)
{
    struct stat st;

    if (ram->fd < 0) {
        return 0;
    }
    g_assert_cmpint(fstat(ram->fd, &st), ==, 0);
    return st.st_ino;
}

/*
 * Mappings of something else than the RAM's own file are segments.  The one
 * of zeros stands for a hole.
 */
static bool is_segment(const FxRam *ram, const Vma *v, uint64_t own)
{
    return v->inode && v->inode != own && !v->zeroes;
}

static void view_maps(const FxRam *ram, FxView *view)
{
    uint64_t *pagemap = read_pagemap(ram);
    g_autoptr(GHashTable) seen = g_hash_table_new_full(g_int64_hash,
                                                       g_int64_equal,
                                                       g_free, NULL);
    uint64_t own = own_inode(ram);
    FILE *f = open_proc("/proc/self/maps");
    char line[512];

    while (fgets(line, sizeof(line), f)) {
        Vma v;

        if (!parse_vma(line, &v) || !in_ram(ram, &v)) {
            continue;
        }
        view->maps++;
        for (uint64_t a = v.start; is_segment(ram, &v, own) && a < v.end;
             a += FX_PAGE) {
            uint64_t entry = pagemap[(a - (uintptr_t)ram->host) / FX_PAGE];
            gint64 *key = g_new(gint64, 1);

            view->segment_pages++;
            if ((entry & PM_SWAPPED) ||
                ((entry & PM_PRESENT) && !(entry & PM_FILE))) {
                view->copied++;
                g_free(key);
                continue;
            }
            *key = v.inode << 16 | (v.offset + a - v.start) / FX_PAGE;
            g_hash_table_add(seen, key);
        }
    }
    view->distinct = g_hash_table_size(seen);
    fclose(f);
    g_free(pagemap);
}

static void view_smaps(const FxRam *ram, FxView *view)
{
    FILE *f = open_proc("/proc/self/smaps");
    char line[512];
    bool inside = false;

    while (fgets(line, sizeof(line), f)) {
        uint64_t kib;
        Vma v;

        if (parse_vma(line, &v)) {
            inside = in_ram(ram, &v);
        } else if (inside &&
                   (sscanf(line, "AnonHugePages: %" SCNu64, &kib) == 1 ||
                    sscanf(line, "ShmemPmdMapped: %" SCNu64, &kib) == 1)) {
            view->huge_pages += kib / 2048;
        } else if (inside &&
                   sscanf(line, "Anonymous: %" SCNu64, &kib) == 1) {
            view->own_pages += kib * 1024 / FX_PAGE;
        }
    }
    fclose(f);
}

void fx_view(const FxRam *ram, FxView *view)
{
    memset(view, 0, sizeof(*view));
    view_maps(ram, view);
    view_smaps(ram, view);
    if (ram->fd >= 0 && ram->kind != FX_PRIVATE) {
        /* a private mapping's first write fills the file below: not ours */
        view->own_pages += file_pages(ram->fd);
    }
}

void fx_merged(const FxRam *ram, bool *merged)
{
    uint64_t own = own_inode(ram);
    FILE *f = open_proc("/proc/self/maps");
    char line[512];
    Vma v;

    memset(merged, false, ram->npages * sizeof(*merged));
    while (fgets(line, sizeof(line), f)) {
        if (parse_vma(line, &v) && in_ram(ram, &v) &&
            is_segment(ram, &v, own)) {
            memset(merged + (v.start - (uintptr_t)ram->host) / FX_PAGE, true,
                   (v.end - v.start) / FX_PAGE * sizeof(*merged));
        }
    }
    fclose(f);
}

bool fx_is_merged(const FxRam *ram, uint32_t page)
{
    g_autofree bool *merged = g_new(bool, ram->npages);

    fx_merged(ram, merged);
    return merged[page];
}

void fx_resident(const FxRam *ram, uint8_t *resident)
{
    uint64_t *pagemap;

    if (ram->kind == FX_MEMFD || ram->kind == FX_TMPFS) {
        g_assert_cmpint(mincore(ram->host, (size_t)ram->npages * FX_PAGE,
                                resident), ==, 0);
        return;
    }
    pagemap = read_pagemap(ram);
    for (uint32_t i = 0; i < ram->npages; i++) {
        resident[i] = !!(pagemap[i] & (PM_PRESENT | PM_SWAPPED));
    }
    g_free(pagemap);
}

bool fx_is_call(const DedupSysCall *call, const char *name)
{
    return strcmp(call->name, name) == 0;
}

bool fx_is_ioctl(const DedupSysCall *call, unsigned long request)
{
    return fx_is_call(call, "ioctl") && call->arg == request;
}

bool fx_maps_segment(const DedupSysCall *call)
{
    return fx_is_call(call, "mmap") && call->fd >= 0 &&
           call->arg == (MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE);
}

bool fx_leave_hole(const DedupSysCall *call)
{
    return munmap((void *)call->addr, *call->len) == 0;
}

bool fx_has_zero_page(void)
{
    FxRam *ram = fx_ram_new(FX_ANON, 16);
    FxView view;

    fx_assert_bytes(ram);
    fx_view(ram, &view);
    fx_ram_free(ram);
    return view.own_pages == 0;
}

void fx_segments(FxSegments *s)
{
    DIR *dir = opendir("/proc/self/fd");
    char link[64] = "";
    struct dirent *d;

    g_assert_nonnull(dir);
    memset(s, 0, sizeof(*s));
    while ((d = readdir(dir))) {
        int fd = atoi(d->d_name);

        int seals = d->d_name[0] == '.' ? -1 : fcntl(fd, F_GET_SEALS);
        struct stat st;

        /* by name: the scanner may close the fd at this moment */
        if (seals < 0 ||
            readlinkat(dirfd(dir), d->d_name, link, sizeof(link) - 1) < 0 ||
            strstr(link, "dedup-zeroes")) {
            continue;
        }
        if ((seals & ALL_SEALS) == ALL_SEALS &&
            fstatat(dirfd(dir), d->d_name, &st, 0) == 0) {
            s->files++;
            s->pages += (uint64_t)st.st_blocks * 512 / FX_PAGE;
        }
    }
    closedir(dir);
}

uint64_t fx_status(const char *name)
{
    FILE *f = open_proc("/proc/self/status");
    size_t len = strlen(name);
    uint64_t kib = UINT64_MAX;
    char line[256];

    while (fgets(line, sizeof(line), f)) {
        if (!strncmp(line, name, len) && line[len] == ':') {
            kib = g_ascii_strtoull(line + len + 1, NULL, 10);
        }
    }
    fclose(f);
    g_assert_cmpuint(kib, !=, UINT64_MAX);
    return kib * 1024;
}

uint64_t fx_maps(void)
{
    FILE *f = open_proc("/proc/self/maps");
    uint64_t n = 0;
    char line[512];

    while (fgets(line, sizeof(line), f)) {
        n++;
    }
    fclose(f);
    return n;
}

uint64_t fx_max_maps(void)
{
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents("/proc/sys/vm/max_map_count", &text,
                                      NULL, NULL));
    return g_ascii_strtoull(text, NULL, 10);
}

/* ---- processes ---- */

pid_t fx_fork(void (*body)(void *opaque), void *opaque)
{
    pid_t pid;

    fflush(stdout);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        body(opaque);
        fflush(stdout);
        _exit(0);
    }
    return pid;
}

int fx_in_child(void (*body)(void *opaque), void *opaque, unsigned seconds)
{
    gint64 end = g_get_monotonic_time() + seconds * G_USEC_PER_SEC;
    pid_t pid = fx_fork(body, opaque);
    int status;

    for (;;) {
        pid_t ret = waitpid(pid, &status, WNOHANG);

        g_assert_cmpint(ret, >=, 0);
        if (ret == pid) {
            return status;
        }
        if (g_get_monotonic_time() > end) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return status;
        }
        g_usleep(1000);
    }
}

void fx_must_pass(void (*body)(void *opaque), void *opaque,
                  unsigned seconds)
{
    int status = fx_in_child(body, opaque, seconds);

    if (status) {
        fx_fail("process failed", "wait status 0x%x", status);
    }
}

/* ---- a memory cgroup ---- */

struct FxCgroup {
    bool v2;
    char *path;
};

/* The directory of the cgroup that we are in, or NULL. */
static char *current_cgroup(bool v2)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;

    if (!g_file_get_contents("/proc/self/cgroup", &text, NULL, NULL)) {
        return NULL;
    }
    lines = g_strsplit(text, "\n", -1);
    for (char **l = lines; *l; l++) {
        g_auto(GStrv) f = g_strsplit(*l, ":", 3);

        if (g_strv_length(f) == 3 &&
            (v2 ? !strcmp(f[0], "0") : !strcmp(f[1], "memory"))) {
            return g_strconcat(v2 ? "/sys/fs/cgroup"
                                  : "/sys/fs/cgroup/memory", f[2], NULL);
        }
    }
    return NULL;
}

static bool write_file(const char *dir, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, text, strlen(text)) ==
              (ssize_t)strlen(text);

    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

static char *read_file(const char *dir, const char *name)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    char *text = NULL;

    g_file_get_contents(path, &text, NULL, NULL);
    return text;
}

FxCgroup *fx_cgroup_new(void)
{
    if (FX_SANITIZED) {
        g_test_skip("the sanitizer's memory is charged to the cgroup");
        return NULL;
    }
    for (int v2 = 0; v2 < 2; v2++) {
        g_autofree char *parent = current_cgroup(v2);
        g_autofree char *path = NULL;
        g_autofree char *usage = NULL;
        FxCgroup *cg;

        if (!parent) {
            continue;
        }
        path = g_strdup_printf("%s/dedup-test-%d", parent, getpid());
        if (mkdir(path, 0755) < 0) {
            continue;
        }
        usage = read_file(path, v2 ? "memory.current"
                                   : "memory.usage_in_bytes");
        if (!usage) {
            rmdir(path); /* version 2 without the controller */
            continue;
        }
        cg = g_new0(FxCgroup, 1);
        cg->v2 = v2;
        cg->path = g_steal_pointer(&path);
        return cg;
    }
    g_test_skip("no memory cgroup can be made here (root only)");
    return NULL;
}

void fx_cgroup_free(FxCgroup *cg)
{
    /* EBUSY until the last of its processes is reaped */
    for (unsigned i = 0; rmdir(cg->path) < 0 && i < 1000; i++) {
        g_usleep(1000);
    }
    g_free(cg->path);
    g_free(cg);
}

bool fx_cgroup_enter(FxCgroup *cg)
{
    return write_file(cg->path, "cgroup.procs", "0");
}

bool fx_cgroup_limit(FxCgroup *cg, uint64_t bytes)
{
    g_autofree char *text = g_strdup_printf("%" PRIu64, bytes);

    return write_file(cg->path, cg->v2 ? "memory.max"
                                       : "memory.limit_in_bytes", text);
}

uint64_t fx_cgroup_usage(FxCgroup *cg)
{
    g_autofree char *text = read_file(cg->path, cg->v2 ? "memory.current" :
                                      "memory.usage_in_bytes");

    g_assert_nonnull(text);
    return g_ascii_strtoull(text, NULL, 10);
}
