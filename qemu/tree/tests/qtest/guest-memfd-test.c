/*
 * QTest testcases for the options of memory-backend-guest-memfd
 *
 * What a backend's options did to its memory is read from the kernel, not from
 * QEMU.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"

/* No other mapping of QEMU has this size. */
#define SIZE (13 * MiB)

/* The backend's mapping, as in proc_pid_smaps(5) and proc_pid_numa_maps(5) */
typedef struct Mapping {
    uint64_t rss;       /* bytes */
    char *flags;        /* of two letters each, with a space after each */
    uint64_t start;
} Mapping;

typedef struct MappingTest {
    const char *name;
    const char *options;    /* JSON; begins with a comma */
    const char *has;        /* flags; NULL: any */
    const char *has_not;
    uint64_t rss;
    const char *policy;     /* NULL: any */
} MappingTest;

/* nr: not reserved; dd: not in dumps */
static const MappingTest mapping_tests[] = {
    { "default", "", "sh ", "nr " },
    { "share/on", ", 'share': true", "sh " },
    { "dump/on", ", 'dump': true", NULL, "dd " },
    { "dump/off", ", 'dump': false", "dd " },
    { "reserve/on", ", 'reserve': true", NULL, "nr " },
    { "reserve/off", ", 'reserve': false", "nr " },
    { "prealloc/on", ", 'prealloc': true", NULL, NULL, SIZE },
    { "policy/bind", ", 'policy': 'bind', 'host-nodes': [ 0 ]",
      .policy = "bind:0" },
};

typedef struct RefusalTest {
    const char *name;
    const char *accel;
    uint64_t size;
    const char *options;
    const char *message;    /* part of it */
} RefusalTest;

static const RefusalTest refusal_tests[] = {
    { "share/off", "kvm", SIZE, ", 'share': false", "share=off" },
    { "size/zero", "kvm", 0, "", "doesn't take value '0'" },
    { "size/unaligned", "kvm", SIZE + 1, "", "a multiple of" },
    { "prealloc/reserve-off", "kvm", SIZE,
      ", 'prealloc': true, 'reserve': false", "prealloc" },
    { "accel/tcg", "tcg", SIZE, "", "-accel kvm" },
};

static QTestState *start(const char *accel)
{
    return qtest_initf("-S -accel %s", accel);
}

/* Returns the answer, which the caller unrefs. */
static QDict *add_backend(QTestState *qts, uint64_t size, const char *options)
{
    g_autofree char *json =
        g_strdup_printf("{ 'qom-type': 'memory-backend-guest-memfd',"
                        "  'id': 'mem0', 'size': %" PRIu64 " %s }",
                        size, options);

    return qtest_qmp(qts, "{ 'execute': 'object-add', 'arguments': %p }",
                     qobject_from_json(json, &error_abort));
}

static void assert_added(QDict *answer)
{
    g_assert_true(qdict_haskey(answer, "return"));
    qobject_unref(answer);
}

static char **proc_lines(QTestState *qts, const char *file)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/%s", qtest_pid(qts),
                                            file);
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    return g_strsplit(text, "\n", -1);
}

/* What follows @prefix in a line; NULL if the line begins otherwise */
static const char *after(const char *line, const char *prefix)
{
    return g_str_has_prefix(line, prefix) ? line + strlen(prefix) : NULL;
}

/* The policy of the mapping at address @start */
static char *read_policy(QTestState *qts, uint64_t start)
{
    g_auto(GStrv) lines = proc_lines(qts, "numa_maps");
    g_autofree char *prefix = g_strdup_printf("%" PRIx64 " ", start);
    size_t i;

    for (i = 0; lines[i]; i++) {
        const char *rest = after(lines[i], prefix);

        if (rest) {
            return g_strndup(rest, strcspn(rest, " "));
        }
    }
    g_assert_not_reached();
}

static Mapping read_mapping(QTestState *qts)
{
    g_auto(GStrv) lines = proc_lines(qts, "smaps");
    uint64_t start, end, ours = 0;
    Mapping found = {};
    size_t i;

    for (i = 0; lines[i]; i++) {
        const char *rest;

        if (sscanf(lines[i], "%" SCNx64 "-%" SCNx64 " ", &start, &end) == 2) {
            if (ours && end - start == SIZE) {
                g_error("two mappings of this size");
            }
            if (end - start == SIZE) {
                ours = start;
            }
        }
        if (!ours || found.flags) {
            continue;
        }
        rest = after(lines[i], "Rss:");
        if (rest) {
            found.rss = g_ascii_strtoull(rest, NULL, 10) * KiB;
        }
        rest = after(lines[i], "VmFlags: ");
        if (rest) {
            found.flags = g_strdup(rest);
        }
    }
    g_assert_cmpint(ours, !=, 0);
    found.start = ours;
    return found;
}

static void assert_mapping(QTestState *qts, const MappingTest *test)
{
    Mapping found = read_mapping(qts);

    g_assert_nonnull(found.flags);
    if (test->has) {
        g_assert_nonnull(strstr(found.flags, test->has));
    }
    if (test->has_not) {
        g_assert_null(strstr(found.flags, test->has_not));
    }
    g_assert_cmpint(found.rss, ==, test->rss);
    if (test->policy) {
        g_autofree char *policy = read_policy(qts, found.start);

        g_assert_cmpstr(policy, ==, test->policy);
    }
    g_free(found.flags);
}

static void test_mapping(const void *data)
{
    const MappingTest *test = data;
    QTestState *qts = start("kvm");

    assert_added(add_backend(qts, SIZE, test->options));
    assert_mapping(qts, test);
    qtest_quit(qts);
}

static void set_dump(QTestState *qts, bool dump)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             "  'path': '/objects/mem0',"
                             "  'property': 'dump', 'value': %i } }", dump);
}

/* Memory that is there can be taken out of dumps, and back in. */
static void test_dump_is_set_later(void)
{
    static const MappingTest in = { .has_not = "dd " }, out = { .has = "dd " };
    QTestState *qts = start("kvm");

    assert_added(add_backend(qts, SIZE, ""));
    set_dump(qts, false);
    assert_mapping(qts, &out);
    set_dump(qts, true);
    assert_mapping(qts, &in);
    qtest_quit(qts);
}

static void test_refusal(const void *data)
{
    const RefusalTest *test = data;
    QTestState *qts = start(test->accel);
    g_autoptr(QDict) answer = add_backend(qts, test->size, test->options);
    QDict *error = qdict_get_qdict(answer, "error");

    g_assert_nonnull(error);
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), test->message));
    qtest_quit(qts);
}

/* Whether a backend can be had here at all */
static bool supported(void)
{
    QTestState *qts;
    QDict *answer;
    bool ret;

    if (!qtest_has_accel("kvm")) {
        return false;
    }
    qts = start("kvm");
    answer = add_backend(qts, SIZE, "");
    ret = qdict_haskey(answer, "return");
    qobject_unref(answer);
    qtest_quit(qts);
    return ret;
}

static void test_skipped(void)
{
    g_test_skip("needs KVM, and guest_memfd memory that can be mapped");
}

int main(int argc, char **argv)
{
    size_t i;

    g_test_init(&argc, &argv, NULL);

    if (!supported()) {
        qtest_add_func("/guest-memfd", test_skipped);
        return g_test_run();
    }

    for (i = 0; i < ARRAY_SIZE(mapping_tests); i++) {
        g_autofree char *path = g_strconcat("/guest-memfd/",
                                            mapping_tests[i].name, NULL);

        qtest_add_data_func(path, &mapping_tests[i], test_mapping);
    }
    qtest_add_func("/guest-memfd/dump/later", test_dump_is_set_later);
    for (i = 0; i < ARRAY_SIZE(refusal_tests); i++) {
        g_autofree char *path = g_strconcat("/guest-memfd/refused/",
                                            refusal_tests[i].name, NULL);

        if (!qtest_has_accel(refusal_tests[i].accel)) {
            continue;
        }
        qtest_add_data_func(path, &refusal_tests[i], test_refusal);
    }
    return g_test_run();
}
