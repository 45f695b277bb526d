/*
 * KVM Userfault: let vCPU threads resolve their own faults
 *
 * The kernel interface follows the KVM Userfault proposal of James Houghton.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-common.h"
#include "exec/cpu-common.h"
#include "system/address-spaces.h"
#include "system/cpus.h"
#include "system/memory.h"
#include "kvm-userfault.h"
#include "trace.h"

#include <linux/kvm.h>

/* Where the pages of a slot are, for kvm_userfault_publish(). */
typedef struct KVMUserfaultRange {
    ram_addr_t start;
    ram_addr_t end;
    unsigned long *bits;
} KVMUserfaultRange;

/*
 * All slots that are trapped.  Replaced as a whole, under kvm_slots_lock,
 * when a slot comes or goes, so that publishing needs no lock.
 */
typedef struct KVMUserfaultMap {
    struct rcu_head rcu;
    unsigned int nr;
    KVMUserfaultRange ranges[];
} KVMUserfaultMap;

static OnOffAuto userfault_wanted = ON_OFF_AUTO_AUTO;

/* NULL while not active.  Written with the BQL. */
static const KVMUserfaultOps *userfault_ops;
static KVMUserfaultMap *userfault_map;

static void kvm_userfault_prop_get(Object *obj, Visitor *v, const char *name,
                                   void *opaque, Error **errp)
{
    visit_type_OnOffAuto(v, name, &userfault_wanted, errp);
}

static void kvm_userfault_prop_set(Object *obj, Visitor *v, const char *name,
                                   void *opaque, Error **errp)
{
    OnOffAuto wanted;

    if (visit_type_OnOffAuto(v, name, &wanted, errp)) {
        userfault_wanted = wanted;
    }
}

void kvm_userfault_class_init(ObjectClass *oc)
{
    object_class_property_add(oc, "userfault", "OnOffAuto",
                              kvm_userfault_prop_get, kvm_userfault_prop_set,
                              NULL, NULL);
    object_class_property_set_description(oc, "userfault",
        "Let vCPU threads resolve their own faults in post-copy migration");
}

bool kvm_userfault_supported(bool *available, Error **errp)
{
    *available = false;

    if (!kvm_enabled() || userfault_wanted == ON_OFF_AUTO_OFF) {
        return true;
    }

    *available = kvm_vm_check_extension(kvm_state, KVM_CAP_USERFAULT) > 0;
    if (!*available && userfault_wanted == ON_OFF_AUTO_ON) {
        error_setg(errp, "userfault=on: the host's kernel has no KVM Userfault"
                   " (KVM_CAP_USERFAULT)");
        return false;
    }
    return true;
}

bool kvm_userfault_can_look_elsewhere(void)
{
    return kvm_enabled() &&
           kvm_vm_check_extension(kvm_state, KVM_CAP_USERFAULT_ADDR) > 0;
}

bool kvm_userfault_required(void)
{
    return userfault_wanted == ON_OFF_AUTO_ON;
}

static uint64_t kvm_userfault_slot_pages(KVMSlot *slot)
{
    return slot->memory_size / qemu_real_host_page_size();
}

static KVMUserfaultBitmap *kvm_userfault_bitmap_new(KVMSlot *slot)
{
    size_t longs = BITS_TO_LONGS(kvm_userfault_slot_pages(slot));
    KVMUserfaultBitmap *bitmap;

    bitmap = g_malloc(sizeof(*bitmap) + longs * sizeof(bitmap->bits[0]));
    memset(bitmap->bits, 0xff, longs * sizeof(bitmap->bits[0]));
    return bitmap;
}

static int kvm_userfault_count_slot(KVMMemoryListener *kml, KVMSlot *slot,
                                    void *opaque)
{
    unsigned int *nr = opaque;

    *nr += !!slot->userfault_bitmap;
    return 0;
}

static int kvm_userfault_add_range(KVMMemoryListener *kml, KVMSlot *slot,
                                   void *opaque)
{
    KVMUserfaultMap *map = opaque;

    if (slot->userfault_bitmap) {
        map->ranges[map->nr++] = (KVMUserfaultRange) {
            .start = slot->ram_start_offset,
            .end = slot->ram_start_offset + slot->memory_size,
            .bits = slot->userfault_bitmap->bits,
        };
    }
    return 0;
}

/* Called with kvm_slots_lock. */
static void kvm_userfault_update_map(void)
{
    KVMUserfaultMap *old = userfault_map;
    KVMUserfaultMap *new;
    unsigned int nr = 0;

    kvm_for_each_slot_locked(kvm_userfault_count_slot, &nr);
    new = g_malloc0(sizeof(*new) + nr * sizeof(new->ranges[0]));
    kvm_for_each_slot_locked(kvm_userfault_add_range, new);

    qatomic_rcu_set(&userfault_map, new);
    if (old) {
        g_free_rcu(old, rcu);
    }
}

/*
 * Clear what is in place in the bitmap of @slot, which is visible to
 * kvm_userfault_publish() by now.
 *
 * A page gets in place at any time.  Whoever puts it there tells ops->missing
 * before it looks at the map, with a barrier in between, and here the map was
 * changed before ops->missing is asked.  One of the two sees the other, and
 * the bit gets cleared.  As bits are only ever cleared, it remains so.
 */
static void kvm_userfault_clear_present(KVMSlot *slot, RAMBlock *rb)
{
    uint64_t npages = kvm_userfault_slot_pages(slot);
    g_autofree unsigned long *missing = bitmap_new(npages);
    size_t i;

    /* Pairs with smp_mb() in kvm_userfault_publish() */
    smp_mb();
    userfault_ops->missing(rb, slot->ram_start_offset - rb->offset, npages,
                           missing);
    for (i = 0; i < BITS_TO_LONGS(npages); i++) {
        qatomic_and(&slot->userfault_bitmap->bits[i], missing[i]);
    }
}

void kvm_userfault_slot_init(KVMSlot *slot)
{
    ram_addr_t offset;
    RAMBlock *rb;

    if (!userfault_ops) {
        return;
    }

    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(slot->ram, false, &offset);
    if (!rb || !userfault_ops->owns(rb)) {
        return;
    }

    slot->userfault_bitmap = kvm_userfault_bitmap_new(slot);
    slot->flags |= KVM_MEM_USERFAULT;
    slot->userfault_ram = userfault_ops->vcpu_ram(rb, offset);
    if (slot->userfault_ram) {
        slot->flags |= KVM_MEM_USERFAULT_ADDR;
    }
    kvm_userfault_update_map();
    kvm_userfault_clear_present(slot, rb);
    trace_kvm_userfault_slot(slot->as_id, slot->slot, slot->start_addr,
                             slot->memory_size, true);
}

void kvm_userfault_slot_fini(KVMSlot *slot)
{
    KVMUserfaultBitmap *bitmap = slot->userfault_bitmap;

    if (!bitmap) {
        return;
    }

    slot->userfault_bitmap = NULL;
    slot->userfault_ram = NULL;
    kvm_userfault_update_map();
    g_free_rcu(bitmap, rcu);
    trace_kvm_userfault_slot(slot->as_id, slot->slot, slot->start_addr,
                             slot->memory_size, false);
}

static int kvm_userfault_start_slot(KVMMemoryListener *kml, KVMSlot *slot,
                                    void *opaque)
{
    int ret;

    kvm_userfault_slot_init(slot);
    if (!slot->userfault_bitmap) {
        return 0;
    }

    ret = kvm_set_user_memory_region(kml, slot, false);
    if (ret) {
        slot->flags &= ~KVM_USERFAULT_SLOT_FLAGS;
        kvm_userfault_slot_fini(slot);
    }
    return ret;
}

/*
 * The flag can't be turned off, for want of memory.  KVM goes on to use the
 * bitmap, with no bit set, and to look up pages where it did.
 */
static void kvm_userfault_keep_slot(KVMSlot *slot)
{
    size_t longs = BITS_TO_LONGS(kvm_userfault_slot_pages(slot));
    ram_addr_t offset;
    RAMBlock *rb;
    size_t i;

    for (i = 0; i < longs; i++) {
        qatomic_and(&slot->userfault_bitmap->bits[i], 0);
    }

    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(slot->ram, false, &offset);
    if (rb && slot->userfault_ram) {
        userfault_ops->keep_vcpu_ram(rb);
    }
}

static int kvm_userfault_stop_slot(KVMMemoryListener *kml, KVMSlot *slot,
                                   void *opaque)
{
    int flags = slot->flags;

    if (!slot->userfault_bitmap) {
        return 0;
    }

    slot->flags &= ~KVM_USERFAULT_SLOT_FLAGS;
    if (kvm_set_user_memory_region(kml, slot, false)) {
        slot->flags = flags;
        kvm_userfault_keep_slot(slot);
    } else {
        kvm_userfault_slot_fini(slot);
    }
    return 0;
}

bool kvm_userfault_start(const KVMUserfaultOps *ops, Error **errp)
{
    int ret;

    assert(bql_locked() && !userfault_ops);

    qatomic_set(&userfault_ops, ops);
    ret = kvm_for_each_slot(kvm_userfault_start_slot, NULL);
    if (ret) {
        error_setg_errno(errp, -ret, "KVM refused KVM_MEM_USERFAULT");
        kvm_userfault_stop();
        return false;
    }
    return true;
}

/*
 * Find the RAM at @gpa without a lock, as the vCPU sees it: in system
 * management mode it may see other memory.
 */
static RAMBlock *kvm_userfault_find(hwaddr gpa, MemTxAttrs attrs,
                                    ram_addr_t *offset)
{
    AddressSpace *as = &address_space_memory;
    hwaddr len = qemu_real_host_page_size();
    MemoryRegion *mr;

    if (attrs.secure && kvm_state->nr_as > 1 && kvm_state->as[1].as) {
        as = kvm_state->as[1].as;
    }

    mr = address_space_translate(as, gpa, offset, &len, false, attrs);
    return mr->ram_block;
}

typedef struct KVMUserfaultOwnPages {
    KVMUserfaultPageFunc *fn;
    void *opaque;
} KVMUserfaultOwnPages;

static void kvm_userfault_own_range(hwaddr gpa, hwaddr len, void *opaque)
{
    size_t size = qemu_real_host_page_size();
    hwaddr end = gpa + len;
    KVMUserfaultOwnPages *own = opaque;

    for (gpa = ROUND_DOWN(gpa, size); gpa < end; gpa += size) {
        ram_addr_t offset;
        RAMBlock *rb = kvm_userfault_find(gpa, MEMTXATTRS_UNSPECIFIED,
                                          &offset);

        if (rb && userfault_ops->owns(rb)) {
            own->fn(rb, offset, own->opaque);
        }
    }
}

void kvm_userfault_foreach_own_page(KVMUserfaultPageFunc *fn, void *opaque)
{
    KVMUserfaultOwnPages own = { .fn = fn, .opaque = opaque };
    CPUState *cpu;

    assert(bql_locked());

    if (!userfault_ops) {
        return;
    }

    RCU_READ_LOCK_GUARD();
    CPU_FOREACH(cpu) {
        kvm_arch_userfault_own_memory(cpu, kvm_userfault_own_range, &own);
    }
}

void kvm_userfault_stop(void)
{
    KVMUserfaultMap *map;

    assert(bql_locked());

    if (!userfault_ops) {
        return;
    }

    /* vCPUs that exit before their slot's flag is off still need the ops. */
    kvm_for_each_slot(kvm_userfault_stop_slot, NULL);
    qatomic_set(&userfault_ops, NULL);

    map = userfault_map;
    qatomic_rcu_set(&userfault_map, NULL);
    if (map) {
        g_free_rcu(map, rcu);
    }
}

/*
 * Clear bits @first to @last.  KVM's load-acquire of the bitmap pairs with
 * qatomic_and(), which is sequentially consistent and so a release: what was
 * written to the pages comes before the bits.
 */
static void kvm_userfault_clear_bits(unsigned long *bits, uint64_t first,
                                     uint64_t last)
{
    uint64_t word;

    for (word = BIT_WORD(first); word <= BIT_WORD(last); word++) {
        unsigned long mask = ~0UL;

        if (word == BIT_WORD(first)) {
            mask &= BITMAP_FIRST_WORD_MASK(first);
        }
        if (word == BIT_WORD(last)) {
            mask &= BITMAP_LAST_WORD_MASK(last + 1);
        }
        qatomic_and(&bits[word], ~mask);
    }
}

void kvm_userfault_publish(RAMBlock *rb, ram_addr_t offset, size_t len)
{
    ram_addr_t start = rb->offset + offset;
    ram_addr_t end = start + len;
    KVMUserfaultMap *map;
    unsigned int i;

    /* Pairs with smp_mb() in kvm_userfault_clear_present() */
    smp_mb();

    RCU_READ_LOCK_GUARD();
    map = qatomic_rcu_read(&userfault_map);
    for (i = 0; map && i < map->nr; i++) {
        KVMUserfaultRange *range = &map->ranges[i];
        ram_addr_t from = MAX(start, range->start);
        ram_addr_t to = MIN(end, range->end);

        if (from < to) {
            size_t size = qemu_real_host_page_size();

            kvm_userfault_clear_bits(range->bits,
                                     (from - range->start) / size,
                                     (to - 1 - range->start) / size);
        }
    }
}

/* Returns false if there is no RAM at @gpa. */
static bool kvm_userfault_try(CPUState *cpu, hwaddr gpa, MemTxAttrs attrs,
                              const KVMUserfaultOps *ops, bool *wait)
{
    ram_addr_t offset;
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    rb = kvm_userfault_find(gpa, attrs, &offset);
    if (!rb || !ops->owns(rb)) {
        return false;
    }

    *wait = ops->fault(cpu, rb, offset);
    return true;
}

typedef struct KVMUserfaultExit {
    hwaddr gpa;
    int as_id;
} KVMUserfaultExit;

static int kvm_userfault_covers(KVMMemoryListener *kml, KVMSlot *slot,
                                void *opaque)
{
    KVMUserfaultExit *exit = opaque;

    return slot->userfault_bitmap && kml->as_id == exit->as_id &&
           exit->gpa - slot->start_addr < slot->memory_size;
}

/* There is no RAM at @gpa.  Returns 0 if KVM has seen that, too, or -1. */
static int kvm_userfault_check_slots(hwaddr gpa, MemTxAttrs attrs)
{
    KVMUserfaultExit exit = {
        .gpa = gpa,
        .as_id = attrs.secure && kvm_state->nr_as > 1,
    };

    if (!kvm_for_each_slot(kvm_userfault_covers, &exit)) {
        return 0;
    }

    error_report("KVM Userfault: exit for 0x%" HWADDR_PRIx ", where there is"
                 " no RAM that is being migrated", gpa);
    return -1;
}

int kvm_userfault_handle_exit(CPUState *cpu, hwaddr gpa, MemTxAttrs attrs)
{
    const KVMUserfaultOps *ops = qatomic_read(&userfault_ops);
    bool wait = false;

    trace_kvm_userfault_exit(cpu->cpu_index, gpa);

    /* Came before the flag was turned off, and is handled after that */
    if (!ops) {
        return 0;
    }

    if (!kvm_userfault_try(cpu, gpa, attrs, ops, &wait)) {
        /*
         * Slots are changed after the memory map, with the BQL.  Once that is
         * through, the map is what KVM knows, too.  What another vCPU has
         * taken away since the exit has no slot any more.
         */
        BQL_LOCK_GUARD();
        if (qatomic_read(&userfault_ops) &&
            !kvm_userfault_try(cpu, gpa, attrs, ops, &wait)) {
            return kvm_userfault_check_slots(gpa, attrs);
        }
    }

    if (wait && !ops->wait(cpu)) {
        return EXCP_INTERRUPT;
    }
    return 0;
}

void kvm_userfault_kick_vcpu_thread(CPUState *cpu)
{
    const KVMUserfaultOps *ops = qatomic_read(&userfault_ops);

    cpus_kick_thread(cpu);
    if (ops) {
        ops->kick(cpu);
    }
}
