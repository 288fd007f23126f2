/*
 * Guest agent: what a file system says about its files
 *
 * Each worker owns a directory and knows what is in it: some slots, each of
 * them empty, a file, a directory or a symbolic link, files with a size, bytes
 * and an extended attribute.  It makes, renames, removes, lists and asks in no
 * order, and compares each answer, errors too, with what it knows.
 *
 * Threads: as in agent-io.c.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>
#include "agent.h"
#include "agent-pool.h"

#define MAX_WORKERS 8
#define SLOTS 32
#define LARGEST 9000
#define ATTRIBUTE "user.test"

typedef enum { NOTHING, PLAIN, DIRECTORY, LINK } Kind;

typedef struct Slot {
    Kind kind;
    uint32_t size;              /* of a file: bytes from @from of a pool */
    uint32_t from;
    uint32_t value;             /* of the attribute, 0: has none */
    uint32_t target;            /* number in a link's text */
} Slot;

typedef struct Worker {
    pthread_t thread;
    uint64_t random;
    char dir[160];
    Slot slot[SLOTS];
} Worker;

static struct {
    uint64_t workers, ops;
    int running, stop, no_attributes;
    Figures f;
    Worker worker[MAX_WORKERS];
} meta = { .f.lock = PTHREAD_MUTEX_INITIALIZER };

/* Names of many lengths; the number stands first. */
static void name_of(unsigned slot, char *name)
{
    unsigned length = 4 + slot * 37 % 200;

    memset(name, 'a' + slot % 26, length);
    name[length] = 0;
    name[0] = '0' + slot / 10;
    name[1] = '0' + slot % 10;
}

static void path_of(Worker *w, unsigned slot, char *path)
{
    char name[256];

    name_of(slot, name);
    snprintf(path, 512, "%s/%s", w->dir, name);
}

/* The call must give @want: 0 or an errno. */
static int expect(long ret, int want, const char *what, const char *path)
{
    int got = ret < 0 ? errno : 0;

    if (got != want) {
        figures_error(&meta.f, "%s %.80s: %s instead of %s", what, path,
                      strerror(got), strerror(want));
        return -1;
    }
    return 0;
}

static void wrong(const char *what, const char *path, uint64_t got,
                  uint64_t want)
{
    pthread_mutex_lock(&meta.f.lock);
    if (!meta.f.first[0]) {
        snprintf(meta.f.first, sizeof(meta.f.first),
                 "%s %.80s: %llu instead of %llu", what, path,
                 (unsigned long long)got, (unsigned long long)want);
    }
    meta.f.bad++;
    pthread_mutex_unlock(&meta.f.lock);
}

static void do_create(Worker *w, Slot *s, const char *path)
{
    uint8_t data[LARGEST];
    int fd = open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);

    if (expect(fd, s->kind == NOTHING ? 0 : EEXIST, "create", path) ||
        fd < 0) {
        return;
    }
    s->kind = PLAIN;
    s->value = 0;
    s->from = agent_random(&w->random) % PG_SIZE;
    s->size = agent_random(&w->random) % LARGEST;
    for (uint32_t i = 0; i < s->size; i++) {
        data[i] = *pool_bytes(s->from + i);
    }
    expect(write(fd, data, s->size) == (ssize_t)s->size ? 0 : -1, 0, "write",
           path);
    expect(close(fd), 0, "close", path);
}

static void do_contents(Worker *w, Slot *s, const char *path)
{
    uint8_t data[LARGEST + 1];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got;

    if (s->kind != PLAIN) {
        /* A link's target does not exist. */
        expect(fd, s->kind == DIRECTORY ? 0 : ENOENT, "open", path);
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    if (expect(fd, 0, "open", path)) {
        return;
    }
    got = read(fd, data, sizeof(data));
    close(fd);
    if (got != (ssize_t)s->size) {
        wrong("length of", path, got, s->size);
        return;
    }
    for (uint32_t i = 0; i < s->size; i++) {
        if (data[i] != *pool_bytes(s->from + i)) {
            figures_bad(&meta.f, &data[i], pool_bytes(s->from + i), 1,
                        "file", i);
        }
    }
}

static void do_stat(Worker *w, Slot *s, const char *path)
{
    static const mode_t modes[] = { 0, S_IFREG, S_IFDIR, S_IFLNK };
    struct stat st;
    int ret = lstat(path, &st);

    if (expect(ret, s->kind == NOTHING ? ENOENT : 0, "stat", path) || ret) {
        return;
    }
    if ((st.st_mode & S_IFMT) != modes[s->kind]) {
        wrong("mode of", path, st.st_mode, modes[s->kind]);
    }
    if (s->kind == PLAIN && st.st_size != s->size) {
        wrong("size of", path, st.st_size, s->size);
    }
}

static void do_truncate(Worker *w, Slot *s, const char *path)
{
    uint32_t size = s->size ? agent_random(&w->random) % s->size : 0;

    if (s->kind == PLAIN && !expect(truncate(path, size), 0, "truncate",
                                    path)) {
        s->size = size;
    }
}

static void do_remove(Worker *w, Slot *s, const char *path)
{
    int ret = s->kind == DIRECTORY ? rmdir(path) : unlink(path);

    if (!expect(ret, s->kind == NOTHING ? ENOENT : 0, "remove", path)) {
        s->kind = NOTHING;
    }
}

static void do_mkdir(Worker *w, Slot *s, const char *path)
{
    if (!expect(mkdir(path, 0700), s->kind == NOTHING ? 0 : EEXIST, "mkdir",
                path) && s->kind == NOTHING) {
        s->kind = DIRECTORY;
    }
}

static void do_link(Worker *w, Slot *s, const char *path)
{
    char text[300], got[300];
    uint32_t target = agent_random(&w->random) % 100000;
    ssize_t n;

    if (s->kind == LINK) {
        snprintf(text, sizeof(text), "nowhere-%0200u", s->target);
        n = readlink(path, got, sizeof(got));
        if (!expect(n, 0, "readlink", path) &&
            (n != (ssize_t)strlen(text) || memcmp(text, got, n))) {
            wrong("text of", path, n, strlen(text));
        }
        return;
    }
    snprintf(text, sizeof(text), "nowhere-%0200u", target);
    if (!expect(symlink(text, path), s->kind == NOTHING ? 0 : EEXIST,
                "symlink", path) && s->kind == NOTHING) {
        s->kind = LINK;
        s->target = target;
    }
}

/* Onto a slot that is empty, or a file onto a file. */
static void do_rename(Worker *w, Slot *s, const char *path)
{
    unsigned to = agent_random(&w->random) % SLOTS;
    char new[512];

    path_of(w, to, new);
    if (&w->slot[to] == s ||
        (w->slot[to].kind != NOTHING &&
         (w->slot[to].kind != PLAIN || s->kind != PLAIN))) {
        return;
    }
    if (!expect(rename(path, new), s->kind == NOTHING ? ENOENT : 0, "rename",
                path) && s->kind != NOTHING) {
        w->slot[to] = *s;
        s->kind = NOTHING;
    }
}

static void attribute_text(uint32_t value, char *text)
{
    snprintf(text, 300, "%0*u", 1 + value % 250, value);
}

static void do_attribute(Worker *w, Slot *s, const char *path)
{
    char text[300], got[300];
    ssize_t n;

    if (s->kind != PLAIN ||
        __atomic_load_n(&meta.no_attributes, __ATOMIC_RELAXED)) {
        return;
    }
    n = getxattr(path, ATTRIBUTE, got, sizeof(got));
    if (n < 0 && (errno == ENOTSUP || errno == ENOSYS)) {
        __atomic_store_n(&meta.no_attributes, 1, __ATOMIC_RELAXED);
        return;
    }
    if (!expect(n, s->value ? 0 : ENODATA, "getxattr", path) && n >= 0) {
        attribute_text(s->value, text);
        if (n != (ssize_t)strlen(text) || memcmp(text, got, n)) {
            wrong("attribute of", path, n, strlen(text));
        }
    }
    s->value = 1 + agent_random(&w->random) % 1000000;
    attribute_text(s->value, text);
    if (setxattr(path, ATTRIBUTE, text, strlen(text), 0) &&
        errno == ENOTSUP) {
        __atomic_store_n(&meta.no_attributes, 1, __ATOMIC_RELAXED);
    }
}

static void do_list(Worker *w, Slot *s, const char *path)
{
    unsigned seen[SLOTS] = { 0 };
    DIR *d = opendir(w->dir);
    struct dirent *e;
    char name[256];

    if (expect(d ? 0 : -1, 0, "opendir", w->dir)) {
        return;
    }
    while ((errno = 0, e = readdir(d))) {
        unsigned i = (e->d_name[0] - '0') * 10 + e->d_name[1] - '0';

        if (e->d_name[0] == '.') {
            continue;
        }
        name_of(i < SLOTS ? i : 0, name);
        if (i >= SLOTS || strcmp(name, e->d_name)) {
            wrong("a name in", w->dir, i, 0);
        } else {
            seen[i]++;
        }
    }
    expect(errno ? -1 : 0, 0, "readdir", w->dir);
    closedir(d);
    for (unsigned i = 0; i < SLOTS; i++) {
        if (seen[i] != (w->slot[i].kind != NOTHING)) {
            path_of(w, i, name);
            wrong("times listed", name, seen[i],
                  w->slot[i].kind != NOTHING);
        }
    }
}

static void (*const operations[])(Worker *, Slot *, const char *) = {
    do_create, do_create, do_contents, do_stat, do_truncate, do_remove,
    do_mkdir, do_link, do_rename, do_attribute, do_list,
};

static void *worker_thread(void *opaque)
{
    Worker *w = opaque;
    char path[512];

    while (!__atomic_load_n(&meta.stop, __ATOMIC_RELAXED)) {
        unsigned slot = agent_random(&w->random) % SLOTS;
        unsigned op = agent_random(&w->random) %
            (sizeof(operations) / sizeof(*operations));

        path_of(w, slot, path);
        operations[op](w, &w->slot[slot], path);
        __atomic_add_fetch(&meta.ops, 1, __ATOMIC_RELAXED);
    }
    /* Once more, all of it; and leave nothing behind. */
    do_list(w, NULL, NULL);
    for (unsigned slot = 0; slot < SLOTS; slot++) {
        path_of(w, slot, path);
        do_stat(w, &w->slot[slot], path);
        do_contents(w, &w->slot[slot], path);
        do_remove(w, &w->slot[slot], path);
    }
    expect(rmdir(w->dir), 0, "rmdir", w->dir);
    return NULL;
}

/* meta-start DIR WORKERS: in new directories below DIR */
int meta_start(int argc, char **argv, char *reply)
{
    Pool pool;

    if (argc != 3 || meta.running || agent_number(argv[2], &meta.workers) ||
        meta.workers > MAX_WORKERS) {
        strcpy(reply, "usage: meta-start DIR WORKERS, once at a time");
        return -1;
    }
    /* The contents are made with the first pool. */
    if (!pool_new(&pool, 1, 0)) {
        pool_free(&pool);
    }
    meta.stop = 0;
    meta.ops = meta.f.bad = meta.f.err = 0;
    meta.f.first[0] = 0;
    for (unsigned i = 0; i < meta.workers; i++) {
        Worker *w = &meta.worker[i];

        memset(w->slot, 0, sizeof(w->slot));
        w->random = pg_key(i, agent_vm_id);
        snprintf(w->dir, sizeof(w->dir), "%.100s/meta%llu-%u", argv[1],
                 (unsigned long long)agent_vm_id, i);
        if (mkdir(w->dir, 0700) ||
            pthread_create(&w->thread, NULL, worker_thread, w)) {
            snprintf(reply, AGENT_REPLY, "%s: %s", w->dir, strerror(errno));
            meta.workers = i;
            meta.running = 1;
            return -1;
        }
    }
    meta.running = 1;
    return 0;
}

int meta_stat(int argc, char **argv, char *reply)
{
    int used = snprintf(reply, AGENT_REPLY, "running=%d ops=%llu xattr=%d ",
                        meta.running, (unsigned long long)meta.ops,
                        !meta.no_attributes);

    figures_report(&meta.f, reply + used, AGENT_REPLY - used);
    return 0;
}

int meta_stop(int argc, char **argv, char *reply)
{
    __atomic_store_n(&meta.stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; meta.running && i < meta.workers; i++) {
        pthread_join(meta.worker[i].thread, NULL);
    }
    meta.running = 0;
    return meta_stat(argc, argv, reply);
}
