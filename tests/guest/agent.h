/*
 * Guest agent of the guest tests: what its parts share
 *
 * agent.c         reads commands from the host, one line each, and answers
 * agent-region.c  memory regions with known contents, and loops over them
 * agent-dio.c     O_DIRECT reads into memory, checked again and again
 * agent-cache.c   a file in the page cache
 * agent-pool.c    memory that is worth merging
 * agent-io.c      a disk or a file, written from and read into such memory
 * agent-meta.c    what a file system says about its files
 * agent-net.c     TCP streams that an echo server sends back
 * agent-bench.c   requests as fast as they go
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_GUEST_AGENT_H
#define TESTS_GUEST_AGENT_H

#include <stdint.h>
#include <stdio.h>

#define AGENT_MAX_ARGS 12
#define AGENT_REPLY 1024

/*
 * A command: argv[0] is its name.  It writes the text that follows "ok " or
 * "err " to @reply and returns 0, or -1 for "err ".
 */
typedef int AgentCommand(int argc, char **argv, char *reply);

/* Distinguishes the guests of one test; set by "id N". */
extern uint64_t agent_vm_id;

/* Parse an unsigned number; returns 0, or -1 if it is none. */
int agent_number(const char *text, uint64_t *value);

/* A cheap random number that differs between threads by their @state. */
uint64_t agent_random(uint64_t *state);

AgentCommand region_alloc, region_verify, region_rewrite, region_touch;
AgentCommand region_loop, region_drop, region_list;
AgentCommand dio_start, dio_stat, dio_stop;
AgentCommand cache_check;
AgentCommand io_start, io_stat, io_halt, io_resume, io_stop;
AgentCommand meta_start, meta_stat, meta_stop;
AgentCommand net_start, net_stat, net_stop;
AgentCommand bench_run, bench_meta;

#endif
