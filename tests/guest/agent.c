/*
 * Guest agent of the guest tests: commands from the host
 *
 * Runs as the only program of the test guest.  It reads one command a line
 * from a port (virtio-serial) and answers each with one line, "ok ..." or
 * "err ...".  When it is ready it says "hello".  The host may go away and come
 * back (a migration): the port then reads end of file for a while.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"

#define MEMORY_BLOCKS "/sys/devices/system/memory"

uint64_t agent_vm_id;

int agent_number(const char *text, uint64_t *value)
{
    unsigned long long v;
    int end = 0;

    if (sscanf(text, "%lli%n", (long long *)&v, &end) != 1 || text[end]) {
        return -1;
    }
    *value = v;
    return 0;
}

uint64_t agent_random(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *state = x;
    return x >> 11;
}

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int ret = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;

    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

static int command_id(int argc, char **argv, char *reply)
{
    if (argc != 2 || agent_number(argv[1], &agent_vm_id)) {
        strcpy(reply, "usage: id NUMBER, before the first alloc");
        return -1;
    }
    return 0;
}

static int command_echo(int argc, char **argv, char *reply)
{
    snprintf(reply, AGENT_REPLY, "%s", argc > 1 ? argv[1] : "");
    return 0;
}

static int command_meminfo(int argc, char **argv, char *reply)
{
    char line[128];
    size_t used = 0;
    FILE *f = fopen("/proc/meminfo", "re");

    if (!f) {
        strcpy(reply, "no /proc/meminfo");
        return -1;
    }
    while (fgets(line, sizeof(line), f) && used < AGENT_REPLY - 64) {
        char name[64];
        unsigned long kib;

        if (sscanf(line, "%63[^:]: %lu kB", name, &kib) == 2 &&
            !strchr(name, '(')) {
            used += snprintf(reply + used, AGENT_REPLY - used, "%s=%lu ",
                             name, kib);
        }
    }
    fclose(f);
    return 0;
}

static int command_sync(int argc, char **argv, char *reply)
{
    sync();
    return write_file("/proc/sys/vm/drop_caches", "3\n");
}

/* online: use each memory block that was plugged; movable, to be unplugged */
static int command_online(int argc, char **argv, char *reply)
{
    DIR *d = opendir(MEMORY_BLOCKS);
    struct dirent *e;
    int count = 0;

    while (d && (e = readdir(d))) {
        char path[512], state[16] = "";
        FILE *f;

        if (strncmp(e->d_name, "memory", 6)) {
            continue;
        }
        snprintf(path, sizeof(path), MEMORY_BLOCKS "/%s/state", e->d_name);
        f = fopen(path, "re");
        if (f) {
            if (fscanf(f, "%15s", state) == 1 && !strcmp(state, "offline") &&
                !write_file(path, "online_movable\n")) {
                count++;
            }
            fclose(f);
        }
    }
    if (d) {
        closedir(d);
    }
    snprintf(reply, AGENT_REPLY, "blocks=%d", count);
    return 0;
}

/* sh WORDS: run them by busybox; its output, on one line */
static int command_sh(int argc, char **argv, char *reply)
{
    char line[512] = "";
    size_t used;
    FILE *f;

    for (int i = 1; i < argc; i++) {
        used = strlen(line);
        snprintf(line + used, sizeof(line) - used, "%s ", argv[i]);
    }
    used = strlen(line);
    snprintf(line + used, sizeof(line) - used, "2>&1");
    f = popen(line, "re");
    if (!f) {
        strcpy(reply, strerror(errno));
        return -1;
    }
    used = fread(reply, 1, AGENT_REPLY - 1, f);
    reply[used] = 0;
    for (size_t i = 0; i < used; i++) {
        if (reply[i] == '\n') {
            reply[i] = ' ';
        }
    }
    return pclose(f) ? -1 : 0;
}

static int command_poweroff(int argc, char **argv, char *reply)
{
    reboot(RB_POWER_OFF);
    strcpy(reply, strerror(errno));
    return -1;
}

static const struct {
    const char *name;
    AgentCommand *run;
} commands[] = {
    { "id", command_id },
    { "alloc", region_alloc },
    { "verify", region_verify },
    { "rewrite", region_rewrite },
    { "touch", region_touch },
    { "loop", region_loop },
    { "drop", region_drop },
    { "list", region_list },
    { "dio-start", dio_start },
    { "dio-stat", dio_stat },
    { "dio-stop", dio_stop },
    { "cache", cache_check },
    { "io-start", io_start },
    { "io-stat", io_stat },
    { "io-halt", io_halt },
    { "io-resume", io_resume },
    { "io-stop", io_stop },
    { "meta-start", meta_start },
    { "meta-stat", meta_stat },
    { "meta-stop", meta_stop },
    { "net-start", net_start },
    { "net-stat", net_stat },
    { "net-stop", net_stop },
    { "bench", bench_run },
    { "bench-meta", bench_meta },
    { "sh", command_sh },
    { "echo", command_echo },
    { "meminfo", command_meminfo },
    { "sync", command_sync },
    { "online", command_online },
    { "poweroff", command_poweroff },
};

static void run_line(char *line, char *answer, size_t size)
{
    static char reply[AGENT_REPLY];
    char *argv[AGENT_MAX_ARGS + 1] = { NULL };
    char *save = NULL;
    int argc = 0;

    for (char *t = strtok_r(line, " \r", &save);
         t && argc < AGENT_MAX_ARGS; t = strtok_r(NULL, " \r", &save)) {
        argv[argc++] = t;
    }
    reply[0] = 0;
    for (size_t i = 0; argc && i < sizeof(commands) / sizeof(*commands); i++) {
        if (!strcmp(commands[i].name, argv[0])) {
            int ret = commands[i].run(argc, argv, reply);

            snprintf(answer, size, "%s %s\n", ret ? "err" : "ok", reply);
            return;
        }
    }
    snprintf(answer, size, "err unknown command\n");
}

static void write_all(int fd, const char *text)
{
    size_t left = strlen(text);

    while (left) {
        ssize_t n = write(fd, text, left);

        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return;
        }
        if (n > 0) {
            text += n;
            left -= n;
        }
    }
}

/*
 * The node of the port may be there before the port (ENXIO, ENOENT).  Nothing
 * in this small a guest tells when it is; the host gives up at some time.
 */
static int open_port(const char *path)
{
    struct timespec pause = { 0, 10000000 };
    int fd;

    while ((fd = open(path, O_RDWR | O_CLOEXEC)) < 0 &&
           (errno == ENXIO || errno == ENOENT || errno == EBUSY)) {
        nanosleep(&pause, NULL);
    }
    return fd;
}

int main(int argc, char **argv)
{
    static char line[512], answer[AGENT_REPLY + 16];
    size_t used = 0;
    int fd = open_port(argc > 1 ? argv[1] : "/dev/vport0p1");

    if (fd < 0) {
        perror("agent: port");
        return 1;
    }
    write_all(fd, "hello\n");
    for (;;) {
        char c;
        ssize_t n = read(fd, &c, 1);

        if (n == 1 && c == '\n') {
            line[used] = 0;
            used = 0;
            run_line(line, answer, sizeof(answer));
            write_all(fd, answer);
        } else if (n == 1 && used < sizeof(line) - 1) {
            line[used++] = c;
        } else if (n <= 0) {
            /* Nobody at the other end: there is no event for its return. */
            struct timespec pause = { 0, 20000000 };

            nanosleep(&pause, NULL);
        }
    }
}
