/*
 * QTest testcases for post-copy migration with KVM Userfault
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

#ifdef CONFIG_LINUX
#include <linux/kvm.h>
#include <sys/ioctl.h>
#endif

static bool kvm_userfault_supported(void)
{
#if defined(CONFIG_LINUX) && defined(KVM_CAP_USERFAULT)
    int kvm = open("/dev/kvm", O_RDONLY);
    int ret;

    if (kvm < 0) {
        return false;
    }
    ret = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USERFAULT);
    close(kvm);
    return ret > 0;
#else
    return false;
#endif
}

/* What the destination says about the migration that is over */
static QDict *query_kvm_userfault(QTestState *to)
{
    QDict *info = migrate_query(to);
    QDict *kvm = qdict_get_qdict(info, "kvm-userfault");

    g_assert_nonnull(kvm);
    qobject_ref(kvm);
    qobject_unref(info);
    return kvm;
}

/* vCPU threads have resolved their own faults, and none was left to others. */
static void assert_used(QTestState *from, QTestState *to, void *opaque)
{
    g_autoptr(QDict) kvm = query_kvm_userfault(to);
    uint64_t exits = qdict_get_int(kvm, "exits");
    uint64_t requests = qdict_get_int(kvm, "requests");

    g_assert_true(qdict_get_bool(kvm, "enabled"));
    g_assert_cmpint(exits, >, 0);
    /* A page whose bit was cleared does not exit again. */
    g_assert_cmpint(qdict_get_int(kvm, "resolved") * 4, <, exits);
    g_assert_cmpint(requests, >, 0);
    g_assert_cmpint(qdict_get_int(kvm, "pages"), >=, requests);
    g_assert_cmpint(qdict_get_int(kvm, "wait-ns"), >, 0);
}

/* userfaultfd has trapped all accesses. */
static void assert_not_used(QTestState *from, QTestState *to, void *opaque)
{
    g_autoptr(QDict) kvm = query_kvm_userfault(to);

    g_assert_false(qdict_get_bool(kvm, "enabled"));
    g_assert_cmpint(qdict_get_int(kvm, "exits"), ==, 0);
    g_assert_cmpint(qlist_size(qdict_get_qlist(kvm, "fallback")), >, 0);
    g_assert_cmpint(qdict_get_int(kvm, "uffd-vcpu-faults"), >, 0);
}

static MigrateCommon kvm_args(const char *userfault)
{
    return (MigrateCommon) {
        .start = {
            .mem_type = MEM_TYPE_MEMFD,
            .kvm_userfault = userfault,
        },
        .end_hook = g_str_equal(userfault, "off") ? assert_not_used
                                                  : assert_used,
    };
}

static void test_postcopy_kvm_auto(void)
{
    MigrateCommon args = kvm_args("auto");

    test_postcopy_common(&args);
}

static void test_postcopy_kvm_on(void)
{
    MigrateCommon args = kvm_args("on");

    test_postcopy_common(&args);
}

static void test_postcopy_kvm_off(void)
{
    MigrateCommon args = kvm_args("off");

    test_postcopy_common(&args);
}

/* A type of memory that is not covered is served by userfaultfd. */
static void test_postcopy_kvm_anonymous(void)
{
    MigrateCommon args = kvm_args("on");

    args.start.mem_type = MEM_TYPE_ANON;
    args.end_hook = assert_not_used;
    test_postcopy_common(&args);
}

static void test_postcopy_kvm_preempt(void)
{
    MigrateCommon args = kvm_args("on");

    args.start.caps[MIGRATION_CAPABILITY_POSTCOPY_PREEMPT] = true;
    test_postcopy_common(&args);
}

static void test_postcopy_kvm_recovery(void)
{
    MigrateCommon args = kvm_args("on");

    test_postcopy_recovery_common(&args);
}

static void test_postcopy_kvm_preempt_recovery(void)
{
    MigrateCommon args = kvm_args("on");

    args.start.caps[MIGRATION_CAPABILITY_POSTCOPY_PREEMPT] = true;
    test_postcopy_recovery_common(&args);
}

void migration_test_add_postcopy_kvm(MigrationTestEnv *env)
{
    if (!env->has_kvm || !env->has_uffd) {
        return;
    }

    migration_test_add("/migration/postcopy/kvm/off", test_postcopy_kvm_off);

    if (!kvm_userfault_supported()) {
        return;
    }

    migration_test_add("/migration/postcopy/kvm/plain",
                       test_postcopy_kvm_auto);
    migration_test_add("/migration/postcopy/kvm/required",
                       test_postcopy_kvm_on);
    migration_test_add("/migration/postcopy/kvm/anonymous",
                       test_postcopy_kvm_anonymous);
    migration_test_add("/migration/postcopy/kvm/preempt/plain",
                       test_postcopy_kvm_preempt);
    migration_test_add("/migration/postcopy/kvm/recovery/plain",
                       test_postcopy_kvm_recovery);
    migration_test_add("/migration/postcopy/kvm/preempt/recovery/plain",
                       test_postcopy_kvm_preempt_recovery);
}
