/*
 * QTest testcases for post-copy migration with KVM Userfault
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qemu/sockets.h"
#include "qemu/thread.h"
#include "libqtest.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-gdb.h"
#include "migration/migration-qmp.h"
#include "migration/migration-relay.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

static bool kvm_has(int capability)
{
    int kvm = open("/dev/kvm", O_RDONLY);
    int ret;

    if (kvm < 0) {
        return false;
    }
    ret = ioctl(kvm, KVM_CHECK_EXTENSION, capability);
    close(kvm);
    return ret > 0;
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

static int64_t sum_of_list(QDict *dict, const char *name)
{
    const QListEntry *entry;
    int64_t sum = 0;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(dict, name), entry) {
        sum += qnum_get_int(qobject_to(QNum, qlist_entry_obj(entry)));
    }
    return sum;
}

/*
 * What postcopy-blocktime says has what vCPUs did not wait for in userfaultfd.
 * A vCPU's time is given in whole milliseconds, rounded down.  A fault counts
 * once, when the vCPU finds its page there, if it had to wait; one that was
 * interrupted exits again, and may be for another page then.
 */
static void assert_blocktime(QTestState *to, QDict *kvm)
{
    QDict *info = migrate_query(to);
    int64_t wait_ms = qdict_get_int(kvm, "wait-ns") / 1000000;
    int64_t vcpus = qlist_size(qdict_get_qlist(info,
                                               "postcopy-vcpu-blocktime"));
    int64_t faults = sum_of_list(info, "postcopy-latency-dist");

    g_assert_cmpint(sum_of_list(info, "postcopy-vcpu-blocktime"), >=,
                    wait_ms - vcpus);
    g_assert_cmpint(qdict_get_int(info, "postcopy-blocktime"), <=,
                    sum_of_list(info, "postcopy-vcpu-blocktime") + vcpus);
    g_assert_cmpint(faults, >, 0);
    g_assert_cmpint(faults, <=, qdict_get_int(kvm, "exits") -
                                qdict_get_int(kvm, "resolved") +
                                qdict_get_int(kvm, "uffd-vcpu-faults") +
                                qdict_get_int(kvm, "uffd-other-faults"));
    g_assert_cmpint(qdict_get_int(info, "postcopy-latency"), >, 0);
    g_assert_cmpint(sum_of_list(info, "postcopy-vcpu-latency"), >, 0);
    qobject_unref(info);
}

/* vCPU threads have resolved their own faults, and none was left to others. */
static void assert_used(QTestState *from, QTestState *to, void *opaque)
{
    g_autoptr(QDict) kvm = query_kvm_userfault(to);
    g_autofree char *text = qtest_hmp(to, "info migrate");
    uint64_t exits = qdict_get_int(kvm, "exits");
    uint64_t requests = qdict_get_int(kvm, "requests");

    g_assert_true(qdict_get_bool(kvm, "enabled"));
    g_assert_cmpint(exits, >, 0);
    /*
     * A page whose bit was cleared does not exit again.  Some arrive while the
     * vCPU exits: more, if QEMU is slow (36 of 100 with ThreadSanitizer), and
     * it matters if there are few exits in all.
     */
    g_assert_cmpint(qdict_get_int(kvm, "resolved"), <, exits / 2 + 16);
    g_assert_cmpint(requests, >, 0);
    g_assert_cmpint(qdict_get_int(kvm, "pages"), >=, requests);
    g_assert_cmpint(qdict_get_int(kvm, "wait-ns"), >, 0);
    g_assert_cmpint(qdict_get_int(kvm, "uffd-vcpu-faults"), ==, 0);
    g_assert_true(qlist_empty(qdict_get_qlist(kvm, "fallback")));
    g_assert_nonnull(strstr(text, "KVM Userfault: \t\ton"));
    assert_blocktime(to, kvm);
}

/* As assert_used(), and huge pages of 2 MiB have come 4 KiB at a time. */
static void assert_used_parts(QTestState *from, QTestState *to, void *opaque)
{
    g_autoptr(QDict) kvm = query_kvm_userfault(to);

    assert_used(from, to, opaque);
    if (kvm_has(KVM_CAP_USERFAULT_ADDR)) {
        g_assert_cmpint(qdict_get_int(kvm, "pages"), >, 10000);
    }
}

/* Of the guest's memory, in KiB; a memfd is shared. */
static uint64_t shared_memory_of(QTestState *who)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", qtest_pid(who));
    g_autofree char *text = NULL;
    const char *line;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    line = strstr(text, "RssShmem:");
    g_assert_nonnull(line);
    return g_ascii_strtoull(line + strlen("RssShmem:"), NULL, 10);
}

/* As assert_used(), and the source has let go of what it sent before, too. */
static void assert_released(QTestState *from, QTestState *to, void *opaque)
{
    assert_used(from, to, opaque);
    g_assert_cmpint(shared_memory_of(to), >, 64 * 1024);
    g_assert_cmpint(shared_memory_of(from), <, 16 * 1024);
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

static void wait_for_waiting_vcpu(QTestState *to)
{
    int64_t waiting;

    do {
        g_autoptr(QDict) kvm = query_kvm_userfault(to);

        waiting = qdict_get_int(kvm, "waiting");
        usleep(1000);
    } while (!waiting);
}

/* A debugger stops the guest, reads registers, and lets it go on. */
static void assert_debugger_attaches(QTestState *to)
{
    int fd = gdb_attach(to);

    gdb_ask(fd, "g");
    gdb_detach(to, fd);
}

/*
 * The connection is gone, and the vCPU needs a page from the other side.
 * Commands that need the vCPU to listen get their answers all the same.  They
 * would be waited for until the test is ended if it did not.
 */
static void assert_vcpu_listens(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    qtest_qmp_assert_success(to, "{ 'execute': 'query-cpus-fast' }");
    qtest_qmp_assert_success(to, "{ 'execute': 'human-monitor-command',"
                             "  'arguments': {"
                             "      'command-line': 'info registers -a' } }");
    qtest_qmp_assert_success(to, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(to, "{ 'execute': 'human-monitor-command',"
                             "  'arguments': {"
                             "      'command-line': 'info registers -a' } }");
    qtest_qmp_assert_success(to, "{ 'execute': 'cont' }");
    wait_for_waiting_vcpu(to);
    assert_debugger_attaches(to);
    wait_for_waiting_vcpu(to);
}

/* fd:fd-mig is this socket to @who, and not the caller's any more. */
static void give_fd(QTestState *who, int fd)
{
    qtest_qmp_fds_assert_success(who, &fd, 1,
                                 "{ 'execute': 'getfd',"
                                 "  'arguments': { 'fdname': 'fd-mig' }}");
    close(fd);
}

/* Nobody recovers it.  QEMU ends in order, and doesn't wait for the page. */
static void assert_quits(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    qtest_qmp_assert_success(to, "{ 'execute': 'quit' }");
    qtest_wait_qemu(to);
}

/* QEMU_VM_COMMAND: MIG_CMD_OPEN_RETURN_PATH, then MIG_CMD_PING, 4 bytes long */
static const uint8_t recovery_begins[] = {
    8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 'p', 'i', 'n', 'g',
};

/* MIG_RP_MSG_PONG */
static const uint8_t return_path_is_open[] = {
    0, 2, 0, 4, 'p', 'i', 'n', 'g',
};

/* The guest goes on at @rip with @rax, until it needs a page. */
static void let_guest_run(QTestState *to, uint32_t rip, uint32_t rax)
{
    g_autofree char *set_rip = g_strdup_printf("P10=%08x00000000",
                                               bswap32(rip));
    g_autofree char *set_rax = g_strdup_printf("P0=%08x00000000",
                                               bswap32(rax));
    int fd = gdb_attach(to);

    /* Without these, one register alone can't be written. */
    gdb_ask(fd, "qXfer:features:read:target.xml:0,ff0");
    gdb_ask(fd, "g");
    gdb_ask(fd, set_rip);
    gdb_ask(fd, set_rax);
    gdb_detach(to, fd);
    wait_for_waiting_vcpu(to);
}

/* a-b-bootblock.S: pre_zero, and do_zero */
#define GUEST_BEGINS 0x7c38
#define GUEST_WRITES_TO_RAX 0x7c3d

/*
 * While the destination recovers, the guest needs another page than before.
 * The source isn't asked for it: what it reads at that time is something else.
 * It is asked later, when the caller resumes the migration.
 */
static void need_page_during_recovery(QTestState *from, QTestState *to)
{
    uint8_t answer[sizeof(return_path_is_open)];
    g_autoptr(QDict) before = NULL;
    int ret, pair[2];
    uint32_t rax;

    migration_event_wait(to, "postcopy-paused");
    wait_for_waiting_vcpu(to);
    ret = qemu_socketpair(PF_LOCAL, SOCK_STREAM, 0, pair);
    g_assert_cmpint(ret, ==, 0);
    ret = send(pair[1], recovery_begins, sizeof(recovery_begins), 0);
    g_assert_cmpint(ret, ==, sizeof(recovery_begins));
    give_fd(to, pair[0]);
    migrate_recover(to, "fd:fd-mig");
    migration_event_wait(to, "postcopy-recover");
    ret = recv(pair[1], answer, sizeof(answer), MSG_WAITALL);
    g_assert_cmpmem(answer, ret, return_path_is_open, sizeof(answer));

    /* What has come since the beginning of post-copy is a few pages. */
    before = query_kvm_userfault(to);
    for (rax = X86_TEST_MEM_START + MiB;; rax += MiB) {
        g_autoptr(QDict) kvm = NULL;

        g_assert_cmphex(rax, <, X86_TEST_MEM_END);
        let_guest_run(to, GUEST_WRITES_TO_RAX, rax);
        kvm = query_kvm_userfault(to);
        if (qdict_get_int(kvm, "requests") >
            qdict_get_int(before, "requests")) {
            break;
        }
    }
    ret = recv(pair[1], answer, sizeof(answer), MSG_DONTWAIT);
    g_assert_cmpint(ret, ==, -1);
    g_assert_cmpint(errno, ==, EAGAIN);
    let_guest_run(to, GUEST_BEGINS, 0);

    migrate_pause(to);
    migration_event_wait(to, "postcopy-paused");
    close(pair[1]);
}

#define HUGE_PAGES "/sys/kernel/mm/hugepages/hugepages-2048kB/"

static uint64_t huge_pages(const char *which)
{
    g_autofree char *path = g_strconcat(HUGE_PAGES, which, NULL);
    g_autofree char *text = NULL;

    return g_file_get_contents(path, &text, NULL, NULL) ?
           g_ascii_strtoull(text, NULL, 10) : 0;
}

/* The connection is cut on this side, while a vCPU needs a page. */
static void cut_by_destination(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    migrate_pause(to);
}

/* The guest has got some pages by then, more than are looked at below. */
static void cut_after_requests(QTestState *from, QTestState *to)
{
    int64_t requests;

    do {
        g_autoptr(QDict) kvm = query_kvm_userfault(to);

        requests = qdict_get_int(kvm, "requests");
        usleep(1000);
    } while (requests < 16);
    cut_by_destination(from, to);
}

/*
 * The connection is gone, and a device needs pages that have arrived before,
 * which nobody but the guest has needed so far.  It has them.
 */
static void assert_arrived_pages_are_read(QTestState *from, QTestState *to)
{
    g_autofree char *registers = NULL;
    const char *eax;
    uint64_t address;
    int i;

    wait_for_waiting_vcpu(to);
    registers = qtest_hmp(to, "info registers");
    eax = strstr(registers, "EAX=");
    g_assert_nonnull(eax);
    /* a-b-bootblock.S: it waits for this page, and has had those before it. */
    address = g_ascii_strtoull(eax + strlen("EAX="), NULL, 16);
    for (i = 1; i < 8; i++) {
        address = (address == X86_TEST_MEM_START ? X86_TEST_MEM_END : address) -
                  4 * KiB;
        qtest_readb(to, address);
    }
}

/*
 * The other side is there and takes nothing, as if the network were dead, while
 * a huge page is under way to it, of which a socket's buffer has a part at
 * most.  The source pauses when it is told to, all the same.
 */
static void pause_stalled_source(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    kill(qtest_pid(to), SIGSTOP);
    migrate_pause(from);
    wait_for_migration_status(from, "postcopy-paused", NULL);
    kill(qtest_pid(to), SIGCONT);
}

static MigrationRelay *relay;

static void *start_relay(QTestState *from, QTestState *to)
{
    int source, destination;

    relay = migration_relay_new(&source, &destination);
    give_fd(from, source);
    give_fd(to, destination);
    migrate_incoming_qmp(to, "fd:fd-mig", NULL, "{}");
    return NULL;
}

static void lose_rest(QTestState *from)
{
    uint64_t dropped = 0;

    migrate_set_parameter_int(from, "max-postcopy-bandwidth", 0);
    while (read_ram_property_int(from, "remaining") ||
           migration_relay_dropped(relay) != dropped) {
        dropped = migration_relay_dropped(relay);
        /* Long enough for the source to begin to wait for the destination */
        g_usleep(500 * 1000);
    }
    g_assert_cmpint(dropped, >, MiB);
    migration_relay_cut(relay);
}

/*
 * The connection breaks when the source has sent everything, and a good part of
 * it has not arrived.
 */
static void lose_last_pages(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    migration_relay_drop_pages(relay);
    lose_rest(from);
}

static char *tmp_path(const char *name)
{
    return g_strdup_printf("%s/%s", migration_get_env()->tmpfs, name);
}

/* Somebody looks whether the port is open, where the source is expected. */
static void probe_destination(QTestState *from, QTestState *to)
{
    g_autofree char *path = tmp_path("probesocket");
    g_autofree char *uri = g_strdup_printf("unix:%s", path);

    migrate_recover(to, uri);
    close(unix_connect(path, &error_abort));
    migration_event_wait(to, "postcopy-recover");
    migration_event_wait(to, "postcopy-paused");
}

/* The main channel, and the one of preempt, both through relays */
static MigrationRelay *channels[2];
static QemuThread channels_thread;

#define CHANNELS_SOCKET "relaysocket"

static void *connect_channels(void *opaque)
{
    g_autofree char *path = tmp_path("migsocket");
    int listener = GPOINTER_TO_INT(opaque);
    size_t i;

    for (i = 0; i < ARRAY_SIZE(channels); i++) {
        int source = accept(listener, NULL, NULL);
        int destination = unix_connect(path, &error_abort);

        g_assert_cmpint(source, >=, 0);
        channels[i] = migration_relay_join(source, destination);
    }
    close(listener);
    return NULL;
}

static void *start_channels(QTestState *from, QTestState *to)
{
    g_autofree char *path = tmp_path(CHANNELS_SOCKET);
    int listener = unix_listen(path, &error_abort);

    qemu_thread_create(&channels_thread, "channels", connect_channels,
                       GINT_TO_POINTER(listener), QEMU_THREAD_JOINABLE);
    return NULL;
}

/*
 * A page that was asked for gets lost on the preempt channel, while everything
 * else arrives on the main one.  That is not the end of the migration.
 */
static void lose_requested_page(QTestState *from, QTestState *to)
{
    g_autofree char *path = tmp_path(CHANNELS_SOCKET);
    g_autoptr(QDict) info = NULL;

    qemu_thread_join(&channels_thread);
    unlink(path);
    migration_relay_drop_pages(channels[1]);
    while (!migration_relay_dropped(channels[1])) {
        usleep(1000);
    }
    migrate_set_parameter_int(from, "max-postcopy-bandwidth", 0);
    while (read_ram_property_int(from, "remaining")) {
        usleep(1000);
    }
    /* Long enough for the destination to read it */
    g_usleep(1000 * 1000);
    wait_for_waiting_vcpu(to);
    info = migrate_query(to);
    g_assert_cmpstr(qdict_get_str(info, "status"), ==, "postcopy-active");
    migration_relay_cut(channels[0]);
    migration_relay_cut(channels[1]);
}

/*
 * Both sides share the host's huge pages.  The source must not need one when
 * they are taken away: have all of its 150 MiB before.
 */
static void *touch_source(QTestState *from, QTestState *to)
{
    uint64_t address;

    for (address = 0; address < 150 * MiB; address += 2 * MiB) {
        qtest_readb(from, address);
    }
    return NULL;
}

static void *taken;
static size_t taken_size;

/*
 * There is memory for a few more pages only: the others are reserved.  With
 * preempt, those that are asked for come as fast as they can, and no other is
 * complete by then.
 */
static void take_huge_pages(QTestState *from, QTestState *to)
{
    uint64_t pages = huge_pages("free_hugepages") -
                     huge_pages("resv_hugepages");

    g_assert_cmpint(pages, >, 2);
    taken_size = (pages - 2) * 2 * MiB;
    taken = mmap(NULL, taken_size, PROT_NONE,
                 MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB |
                 21 << MAP_HUGE_SHIFT, -1, 0);
    g_assert(taken != MAP_FAILED);
}

static void run_out_of_memory(QTestState *from, QTestState *to)
{
    take_huge_pages(from, to);
    migrate_set_parameter_int(from, "max-postcopy-bandwidth", 0);
}

static void give_huge_pages_back(QTestState *from, QTestState *to)
{
    munmap(taken, taken_size);
}

/*
 * Nearly everything may have been sent when post-copy starts.  What is left
 * must not arrive before the guest needs any of it: 64 KiB/s.
 */
#define SLOW_POSTCOPY "-global migration.max-postcopy-bandwidth=65536"

/* From when a vCPU has needed a page, all may come as fast as it can. */
static void speed_up(QTestState *from, QTestState *to)
{
    int64_t needed;

    do {
        g_autoptr(QDict) kvm = query_kvm_userfault(to);

        needed = qdict_get_int(kvm, "exits") +
                 qdict_get_int(kvm, "uffd-vcpu-faults");
        usleep(1000);
    } while (!needed);
    migrate_set_parameter_int(from, "max-postcopy-bandwidth", 0);
}

/*
 * The guest begins again while most of its memory is on the source: firmware
 * moves memory slots about, and QEMU writes ROMs, whose pages may be missing.
 */
static void reset_guest(QTestState *from, QTestState *to)
{
    wait_for_waiting_vcpu(to);
    qtest_qmp_assert_success(to, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(to, "RESET");
    wait_for_waiting_vcpu(to);
    speed_up(from, to);
}

/* Memory that can be unplugged */
#define DIMM "-m 150M,slots=1,maxmem=512M" \
             " -object memory-backend-memfd,id=dimm.mem,size=128M,share=on" \
             " -device pc-dimm,id=dimm,memdev=dimm.mem"

/* Registers of q35, see docs/specs/acpi_mem_hotplug.rst */
#define ACPI_MEMORY_SLOT        0xa00
#define ACPI_MEMORY_CONTROL     0xa14
#define ACPI_MEMORY_EJECT       8

/* Memory may not go while some of it has to come, whoever wants it gone. */
static void refuse_unplug(QTestState *from, QTestState *to)
{
    QDict *error = qtest_qmp_assert_failure_ref(
        to, "{ 'execute': 'device_del', 'arguments': { 'id': 'dimm' } }");

    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), "post-copy"));
    qobject_unref(error);

    qtest_outl(to, ACPI_MEMORY_SLOT, 0);
    qtest_outb(to, ACPI_MEMORY_CONTROL, ACPI_MEMORY_EJECT);
    qtest_qmp_eventwait(to, "DEVICE_UNPLUG_GUEST_ERROR");
    speed_up(from, to);
}

#ifdef CONFIG_GNUTLS
static void assert_used_tls(QTestState *from, QTestState *to, void *opaque)
{
    assert_used(from, to, NULL);
    migrate_hook_end_tls_psk(from, to, opaque);
}
#endif

static void assert_used_fd(QTestState *from, QTestState *to, void *opaque)
{
    assert_used(from, to, NULL);
    migrate_hook_end_fd(from, to, opaque);
}

#define TO_SOURCE "to-source"
#define TO_DESTINATION "to-destination"

/*
 * Commands that move what QEMU writes to one FIFO, and what comes from another
 * to QEMU.  Each FIFO is opened when the other side does it, too.
 */
static char *exec_uri(const char *in, const char *out)
{
    const char *tmpfs = migration_get_env()->tmpfs;

    return g_strdup_printf("exec:cat < %s/%s & exec cat > %s/%s",
                           tmpfs, in, tmpfs, out);
}

static void *make_fifos(QTestState *from, QTestState *to)
{
    g_autofree char *to_source = tmp_path(TO_SOURCE);
    g_autofree char *to_destination = tmp_path(TO_DESTINATION);

    g_assert_cmpint(mkfifo(to_source, 0600), ==, 0);
    g_assert_cmpint(mkfifo(to_destination, 0600), ==, 0);
    return NULL;
}

static void assert_used_exec(QTestState *from, QTestState *to, void *opaque)
{
    g_autofree char *to_source = tmp_path(TO_SOURCE);
    g_autofree char *to_destination = tmp_path(TO_DESTINATION);

    assert_used(from, to, NULL);
    unlink(to_source);
    unlink(to_destination);
}

typedef struct KvmTest {
    const char *name;
    MemType mem_type;
    MigrationCapability cap;    /* beside those of any post-copy; 0: none */
    bool preempt;
    bool recovery;
    bool tls;
    bool unix_socket;
    bool channels;              /* of a unix_socket, through relays */
    bool exec;
    bool x86;                   /* needs to know what the guest's code is */
    MigrateCommon args;
} KvmTest;

/* Without a setting, userfault=on: the migration fails if it can't be used. */
static const KvmTest kvm_tests[] = {
    { "plain", MEM_TYPE_MEMFD, .args.start.kvm_userfault = "auto" },
    { "required", MEM_TYPE_MEMFD },
    { "anonymous", MEM_TYPE_ANON },
    { "hugetlb", MEM_TYPE_HUGETLB },
    { "guest-memfd", MEM_TYPE_GUEST_MEMFD },
    { "dirty-ring", MEM_TYPE_MEMFD, .args.start.use_dirty_ring = true },
    { "release-ram", MEM_TYPE_MEMFD, .cap = MIGRATION_CAPABILITY_RELEASE_RAM,
      .args.end_hook = assert_released },
    { "multifd", MEM_TYPE_MEMFD, .cap = MIGRATION_CAPABILITY_MULTIFD },
    { "unix", MEM_TYPE_MEMFD, .unix_socket = true },
    { "preempt/unix", MEM_TYPE_MEMFD, .unix_socket = true, .preempt = true },
    { "fd", MEM_TYPE_MEMFD,
      .args = { .listen_uri = "defer", .connect_uri = "fd:fd-mig",
                .start_hook = migrate_hook_start_fd,
                .end_hook = assert_used_fd } },
    { "exec", MEM_TYPE_MEMFD, .exec = true,
      .args = { .start_hook = make_fifos, .end_hook = assert_used_exec } },
    { "reset", MEM_TYPE_MEMFD, .args.postcopy_started_hook = reset_guest },
    { "unplug", MEM_TYPE_MEMFD, .x86 = true,
      .args = { .start.opts_source = DIMM, .start.opts_target = DIMM,
                .postcopy_started_hook = refuse_unplug } },
    { "vcpus", MEM_TYPE_MEMFD, .args.start.opts_source = "-smp 64",
      .args.start.opts_target = "-smp 64" },
    { "preempt/plain", MEM_TYPE_MEMFD, .preempt = true },
    { "preempt/anonymous", MEM_TYPE_ANON, .preempt = true },
    { "preempt/guest-memfd", MEM_TYPE_GUEST_MEMFD, .preempt = true },
    { "preempt/release-ram", MEM_TYPE_MEMFD, .preempt = true,
      .cap = MIGRATION_CAPABILITY_RELEASE_RAM,
      .args.end_hook = assert_released },
    { "preempt/multifd", MEM_TYPE_MEMFD, .preempt = true,
      .cap = MIGRATION_CAPABILITY_MULTIFD },
#ifdef CONFIG_GNUTLS
    { "tls/psk", MEM_TYPE_MEMFD, .tls = true },
    { "preempt/tls/psk", MEM_TYPE_MEMFD, .preempt = true, .tls = true },
    { "preempt/recovery/tls/psk", MEM_TYPE_MEMFD, .preempt = true,
      .recovery = true, .tls = true },
#endif
    { "recovery/plain", MEM_TYPE_MEMFD, .recovery = true },
    { "recovery/anonymous", MEM_TYPE_ANON, .recovery = true },
    { "recovery/destination", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_pause_hook = cut_by_destination },
    { "recovery/last-pages", MEM_TYPE_MEMFD, .recovery = true,
      .args = { .listen_uri = "defer", .connect_uri = "fd:fd-mig",
                .start_hook = start_relay,
                .postcopy_pause_hook = lose_last_pages } },
    { "recovery/probe", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_paused_hook = probe_destination },
    { "recovery/hugetlb", MEM_TYPE_HUGETLB, .recovery = true },
    { "recovery/guest-memfd", MEM_TYPE_GUEST_MEMFD, .recovery = true },
    { "recovery/host-access", MEM_TYPE_GUEST_MEMFD, .recovery = true,
      .x86 = true,
      .args = { .postcopy_pause_hook = cut_after_requests,
                .postcopy_paused_hook = assert_arrived_pages_are_read } },
    { "recovery/double-failures/handshake", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_recovery_fail_stage = POSTCOPY_FAIL_RECOVERY },
    { "recovery/double-failures/reconnect", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_recovery_fail_stage = POSTCOPY_FAIL_CHANNEL_ESTABLISH },
    { "recovery/commands", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_paused_hook = assert_vcpu_listens },
    { "recovery/quit", MEM_TYPE_MEMFD, .recovery = true,
      .args.postcopy_paused_hook = assert_quits,
      .args.postcopy_abandoned = true },
    { "recovery/no-memory", MEM_TYPE_HUGETLB, .recovery = true,
      .args = { .start_hook = touch_source,
                .postcopy_pause_hook = run_out_of_memory,
                .postcopy_paused_hook = give_huge_pages_back } },
    { "recovery/new-request", MEM_TYPE_MEMFD, .recovery = true, .x86 = true,
      .args.postcopy_paused_hook = need_page_during_recovery },
    { "preempt/hugetlb", MEM_TYPE_HUGETLB, .preempt = true },
    { "preempt/recovery/plain", MEM_TYPE_MEMFD, .preempt = true,
      .recovery = true },
    { "preempt/recovery/anonymous", MEM_TYPE_ANON, .preempt = true,
      .recovery = true },
    { "preempt/recovery/hugetlb", MEM_TYPE_HUGETLB, .preempt = true,
      .recovery = true },
    { "preempt/recovery/stalled", MEM_TYPE_HUGETLB, .preempt = true,
      .recovery = true, .unix_socket = true,
      .args.postcopy_pause_hook = pause_stalled_source },
    { "preempt/recovery/quit", MEM_TYPE_MEMFD, .preempt = true,
      .recovery = true, .args.postcopy_paused_hook = assert_quits,
      .args.postcopy_abandoned = true },
    { "preempt/recovery/last-request", MEM_TYPE_MEMFD, .preempt = true,
      .recovery = true, .unix_socket = true, .channels = true,
      .args = { .start_hook = start_channels,
                .postcopy_pause_hook = lose_requested_page } },
    { "preempt/recovery/guest-memfd", MEM_TYPE_GUEST_MEMFD, .preempt = true,
      .recovery = true },
    { "preempt/recovery/no-memory", MEM_TYPE_HUGETLB, .preempt = true,
      .recovery = true,
      .args = { .start_hook = touch_source,
                .postcopy_pause_hook = take_huge_pages,
                .postcopy_paused_hook = give_huge_pages_back } },
    { "preempt/recovery/commands", MEM_TYPE_ANON, .preempt = true,
      .recovery = true, .args.postcopy_paused_hook = assert_vcpu_listens },
};

static const KvmTest kvm_test_off = {
    "off", MEM_TYPE_MEMFD,
    .args = { .start.kvm_userfault = "off", .end_hook = assert_not_used },
};

static void run_kvm_test(const KvmTest *test)
{
    MigrateCommon args = test->args;
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket",
                                           migration_get_env()->tmpfs);
    g_autofree char *channels_uri = g_strdup_printf("unix:%s/" CHANNELS_SOCKET,
                                                    migration_get_env()->tmpfs);
    g_autofree char *opts = NULL;
    g_autofree char *exec_listen = exec_uri(TO_DESTINATION, TO_SOURCE);
    g_autofree char *exec_connect = exec_uri(TO_SOURCE, TO_DESTINATION);

    /* Two guests of 150 MiB */
    if (test->mem_type == MEM_TYPE_HUGETLB &&
        huge_pages("free_hugepages") < 150) {
        g_test_skip("needs 150 free huge pages of 2 MiB");
        return;
    }

    args.start.mem_type = test->mem_type;
    args.start.kvm_userfault = args.start.kvm_userfault ?: "on";
    args.end_hook = args.end_hook ?: test->mem_type == MEM_TYPE_HUGETLB ?
                    assert_used_parts : assert_used;
    args.start.caps[MIGRATION_CAPABILITY_POSTCOPY_PREEMPT] = test->preempt;
    if (test->cap) {
        args.start.caps[test->cap] = true;
    }

    if (test->unix_socket) {
        args.listen_uri = uri;
    }
    if (test->channels) {
        args.connect_uri = channels_uri;
    }
    if (test->exec) {
        args.listen_uri = exec_listen;
        args.connect_uri = exec_connect;
    }

    if (!test->recovery) {
        opts = g_strdup_printf("%s " SLOW_POSTCOPY,
                               args.start.opts_source ?: "");
        args.start.opts_source = opts;
        args.postcopy_started_hook = args.postcopy_started_hook ?: speed_up;
    }
#ifdef CONFIG_GNUTLS
    if (test->tls) {
        args.start_hook = migrate_hook_start_tls_psk_match;
        args.end_hook = assert_used_tls;
    }
#endif

    if (test->recovery) {
        test_postcopy_recovery_common(&args);
    } else {
        test_postcopy_common(&args);
    }
}

#define KVM_TESTS "/migration/postcopy/kvm/"

static void test_postcopy_kvm(void *name)
{
    const char *suffix = (const char *)name + strlen(KVM_TESTS);
    size_t i;

    for (i = 0; i < ARRAY_SIZE(kvm_tests); i++) {
        if (g_str_equal(suffix, kvm_tests[i].name)) {
            run_kvm_test(&kvm_tests[i]);
            return;
        }
    }
    g_assert_not_reached();
}

static void test_postcopy_kvm_off(void)
{
    run_kvm_test(&kvm_test_off);
}

static const MigrateStart slow_start = {
    .hide_stderr = true,
    .mem_type = MEM_TYPE_MEMFD,
    .kvm_userfault = "on",
    .opts_source = SLOW_POSTCOPY,
    .caps[MIGRATION_CAPABILITY_POSTCOPY_RAM] = true,
    .caps[MIGRATION_CAPABILITY_POSTCOPY_BLOCKTIME] = true,
};

/* Start a migration that does not end by itself, and wait for some of it. */
static void start_precopy(QTestState *from, QTestState *to, const char *uri)
{
    migrate_ensure_non_converge(from);
    migrate_prepare_for_dirty_mem(from);
    wait_for_serial("src_serial");
    migrate_qmp(from, to, uri, NULL, "{}");
    migrate_wait_for_dirty_mem(from, to);
}

/* As start_precopy(), of new guests.  Returns false if they can't start. */
static bool start_through_relay(QTestState **from, QTestState **to)
{
    MigrateStart start = slow_start;

    if (migrate_start(from, to, "defer", &start)) {
        return false;
    }
    start_relay(*from, *to);
    start_precopy(*from, *to, "fd:fd-mig");
    return true;
}

/*
 * A migration is cancelled before post-copy starts.  The guest runs on, and
 * moves to another destination by post-copy.
 */
static void test_postcopy_kvm_cancel(void)
{
    MigrateStart start = slow_start;
    QTestState *from, *to;

    if (migrate_start(&from, &to, "defer", &start)) {
        return;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    start_precopy(from, to, NULL);
    migrate_cancel(from);
    qtest_set_expected_status(to, EXIT_FAILURE);
    qtest_wait_qemu(to);
    qtest_quit(to);
    wait_for_migration_status(from, "cancelled", NULL);

    start.only_target = true;
    if (migrate_start(&from, &to, "defer", &start)) {
        return;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    start_precopy(from, to, NULL);
    migrate_postcopy_start(from, to, get_src());
    speed_up(from, to);
    wait_for_migration_complete(from);
    wait_for_serial("dest_serial");
    assert_used(from, to, NULL);
    migrate_end(from, to, true);
}

static bool guest_runs(QTestState *who)
{
    g_autoptr(QDict) status =
        qtest_qmp_assert_success_ref(who, "{ 'execute': 'query-status' }");

    return qdict_get_bool(status, "running");
}

/*
 * The destination has everything, and the source does not get to know it before
 * the connection breaks.  It must not start the guest a second time.
 */
static void test_postcopy_kvm_lost_answer(void)
{
    QTestState *from, *to;

    if (!start_through_relay(&from, &to)) {
        return;
    }
    migrate_postcopy_start(from, to, get_src());
    /* The source has the last answer that it needs before the end. */
    wait_for_migration_status(from, "postcopy-active", NULL);
    /* Pages come without being asked for. */
    migration_relay_drop_answers(relay);
    speed_up(from, to);
    wait_for_migration_status(to, "completed", NULL);
    wait_for_serial("dest_serial");
    migration_relay_cut(relay);

    wait_for_migration_status(from, "postcopy-paused", NULL);
    g_assert_false(guest_runs(from));
    assert_used(from, to, NULL);
    migrate_end(from, to, true);
}

/*
 * The source has sent everything, and the destination gets nothing of it, not
 * even the device state, before the connection breaks.  The guest goes on where
 * it was.
 */
static void test_postcopy_kvm_lost_start(void)
{
    const char *any_status[] = { NULL };
    QTestState *from, *to;

    if (!start_through_relay(&from, &to)) {
        return;
    }
    migration_relay_drop_pages(relay);
    qtest_qmp_assert_success(from, "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_status(from, "postcopy-device", NULL);
    qtest_set_expected_status(to, EXIT_FAILURE);
    lose_rest(from);

    wait_for_migration_status(from, "failed", any_status);
    while (!guest_runs(from)) {
        usleep(1000);
    }
    qtest_wait_qemu(to);
    migrate_end(from, to, false);
}

void migration_test_add_postcopy_kvm(MigrationTestEnv *env)
{
    size_t i;

    if (!env->has_kvm || !env->has_uffd) {
        return;
    }

    migration_test_add(KVM_TESTS "off", test_postcopy_kvm_off);

    if (!kvm_has(KVM_CAP_USERFAULT)) {
        return;
    }

    migration_test_add(KVM_TESTS "cancel", test_postcopy_kvm_cancel);
    migration_test_add(KVM_TESTS "lost-start", test_postcopy_kvm_lost_start);
    migration_test_add(KVM_TESTS "lost-answer", test_postcopy_kvm_lost_answer);

    for (i = 0; i < ARRAY_SIZE(kvm_tests); i++) {
        if (kvm_tests[i].x86 && !g_str_equal(env->arch, "x86_64")) {
            continue;
        }
        migration_test_add_suffix(KVM_TESTS, kvm_tests[i].name,
                                  test_postcopy_kvm);
    }
}
