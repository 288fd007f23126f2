/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the tests of groups and of peers share: a directory, members with
 * pages and segments to serve, member processes that are told what to do,
 * and a fake member that can lie.
 */

#ifndef TEST_GROUP_UTIL_H
#define TEST_GROUP_UTIL_H

#include "group/group-internal.h"

#define TEST_PAGES 256          /* pages that a member has */

/* A temporary directory (to g_free()), and removing it with its contents. */
char *test_dir_new(void);
void test_dir_free(char *dir);
/* Is DIR/v1-4k/@name there? */
bool test_dir_has(const char *dir, const char *name);

/* A member: a group and what it serves. */
typedef struct TestMember {
    DedupGroup *g;
    uint8_t (*pages)[DEDUP_PAGE_SIZE];  /* TEST_PAGES */
    bool absent[TEST_PAGES];            /* neither hashed nor in it */
    uint32_t gid;                       /* of its segment: all its pages */
    int segment;
    unsigned hashed;                    /* calls of keyed_hash() */
} TestMember;

/* Page @i of every member starts as test_fill(page, seed + i). */
void test_fill(uint8_t *page, unsigned seed);
TestMember *test_member_new(const char *dir, unsigned seed);
/* What a TestMember joins with. */
const DedupGroupOps *test_ops(void);
/* For a join that fails: returns the message, to be freed. */
char *test_join_error(const char *dir);
void test_member_free(TestMember *m);

/*
 * The fixture of most tests of peers: a directory with two members that have
 * the same pages.  On whatever path, no descriptor stays open.
 */
typedef struct TestPair {
    char *dir;
    unsigned fds;
    TestMember *a;              /* slot 0 */
    TestMember *b;              /* slot 1 */
} TestPair;

void test_pair_add(const char *name, void (*fn)(TestPair *, gconstpointer));

/* Close connections: those not used from one refresh to the next are. */
void test_hang_up(TestMember *m);

/* Open descriptors of this process. */
unsigned test_count_fds(void);

/*
 * A process that joins @dir and then does what it is told, one letter at a
 * time: see test_child_main().  test_tell() waits for the answer.
 */
typedef struct TestChild {
    pid_t pid;
    int fd;
} TestChild;

TestChild test_child_new(const char *dir, unsigned seed);
int test_tell(TestChild *c, char command);
/* 'q'uit, or SIGKILL; waits for the end. */
void test_child_quit(TestChild *c);
void test_child_kill(TestChild *c);

/*
 * A fake member: holds slot @member, listens at its name, and hands each
 * connection to @serve on a thread of its own.
 */
typedef struct TestFake TestFake;
typedef void (*TestServe)(int sock, void *opaque);

TestFake *test_fake_new(const char *dir, unsigned member, TestServe serve,
                        void *opaque);
void test_fake_free(TestFake *f);
/* Blocking, at most two seconds; fds that come are closed. */
bool test_receive(int sock, DedupMessage *m);
void test_greet(int sock, uint8_t *nonce);
/* A blocking connection to @member. */
int test_connect(const char *dir, unsigned member);

#endif /* TEST_GROUP_UTIL_H */
