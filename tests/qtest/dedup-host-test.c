/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: what blocks it on a host that is not this one
 *
 * The host that a case needs is hardly ever there.  QEMU is told that it is:
 * what it asks the kernel is answered by a filter or by another function, and
 * all that follows from the answer is QEMU's own.
 */

#include "qemu/osdep.h"
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include "dedup-qtest.h"

#define SCANNER "-object dedup-scanner,id=ds0," DEDUP_FAST " "

/* The system call's number, or the low half of argument @n */
#define LOAD(field) \
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* Go on if that is @what, else skip @n statements. */
#define IS(what, n) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, what, 0, n)
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, what)

/*
 * From now on KVM does not say that it follows changes of memory mappings, to
 * this process and all QEMUs that it starts: an error of 0 is the answer 0.
 */
static bool hide_sync_mmu(void)
{
    struct sock_filter code[] = {
        LOAD(nr),
        IS(SYS_ioctl, 5),
        LOAD(args[1]),
        IS(KVM_CHECK_EXTENSION, 3),
        LOAD(args[2]),
        IS(KVM_CAP_SYNC_MMU, 1),
        RETURN(SECCOMP_RET_ERRNO | 0),
        RETURN(SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { G_N_ELEMENTS(code), code };

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0) {
        g_test_skip("this kernel has no filters of system calls");
        return false;
    }
    return true;
}

/* Blocked, and nothing has been merged. */
static void assert_blocked(QTestState *qts, const char *reason,
                           const char *text)
{
    dedup_assert_blocked(qts, reason, text);
    g_assert_cmpint(dedup_figure(qts, "full-scans"), ==, 0);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
}

/* A KVM that would go on using memory that was replaced */
static void test_kvm_sync_mmu(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    if (!qtest_has_accel("kvm") || access("/dev/kvm", R_OK | W_OK) < 0) {
        g_test_skip("no KVM");
        return;
    }
    if (!hide_sync_mmu()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-S -accel kvm -cpu qemu64 " SCANNER);
    assert_blocked(qts, "kvm-sync-mmu", "use a kernel whose KVM follows");
    qtest_quit(qts);

    /* The same VM without KVM, which it does not matter to */
    qts = qtest_init(DEDUP_MACHINE SCANNER);
    dedup_wait_at_least(qts, "full-scans", 1);
    qtest_quit(qts);
}

/*
 * A confidential guest.  Its machine cannot start without such a processor: it
 * becomes one when it has.
 */
static void check_confidential(const char *mode)
{
    QTestState *qts = qtest_init(DEDUP_MACHINE "-object sev-guest,id=sev0,"
                                 "cbitpos=47,reduced-phys-bits=1");

    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': '/machine', 'property':"
                             " 'confidential-guest-support',"
                             " 'value': '/objects/sev0' } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'id': 'ds0', 'qom-type': 'dedup-scanner',"
                             " 'mode': %s } }", mode);
    assert_blocked(qts, "confidential", "cannot be compared");
    qtest_quit(qts);
}

static void test_confidential(void)
{
    if (dedup_skip()) {
        return;
    }
    check_confidential("full");
    /* Not even counted: what the host sees is not what the guest has. */
    check_confidential("estimate");
}

/* A host with pages of 64 KiB: nothing is merged, and the VM starts (I9). */
static void test_host_page_size(void)
{
    g_autofree char *binary = g_strdup(g_getenv("QTEST_QEMU_BINARY"));
    g_autofree char *dir = NULL, *wrapped = NULL, *compile = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    compile = g_strdup_printf("echo 'int getpagesize(void) "
                              "{ return 65536; }' | "
                              "cc -shared -fPIC -o %s/page.so -x c -", dir);
    if (system(compile) != 0) {
        g_test_skip("no C compiler");
    } else {
        wrapped = g_strdup_printf("env LD_PRELOAD=%s/page.so %s", dir, binary);
        g_setenv("QTEST_QEMU_BINARY", wrapped, true);
        qts = qtest_init(DEDUP_MACHINE SCANNER);
        g_setenv("QTEST_QEMU_BINARY", binary, true);
        assert_blocked(qts, "host-page-size", "4 KiB");
        g_assert_null(dedup_blocked(qts, "userfaultfd"));
        qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                                 " 'arguments': { 'id': 'ds0' } }");
        qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
        qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                                 " 'arguments': { 'id': 'ds0' } }");
        qtest_quit(qts);
        g_free(compile);
        compile = g_strdup_printf("%s/page.so", dir);
        unlink(compile);
    }
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/host/page-size", test_host_page_size);
    qtest_add_func("/dedup/host/confidential", test_confidential);
    /* The last: it leaves a filter. */
    qtest_add_func("/dedup/host/kvm-sync-mmu", test_kvm_sync_mmu);
    return g_test_run();
}
