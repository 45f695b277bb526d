/*
 * KVM Userfault: guest memory that KVM itself accesses on x86
 *
 * What the paravirtual interfaces share with the guest, by the registers that
 * tell KVM where: Documentation/virt/kvm/x86/msr.rst in Linux, and the
 * Hypervisor Top Level Functional Specification for those of Hyper-V.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "cpu.h"
#include "accel/kvm/kvm-userfault.h"

/* Each of them has the address of a page and an enable bit. */
#define HV_PAGE_ENABLED 1
#define HV_PAGE_SIZE    4096

/* The sizes are those of the structures in Linux' asm/kvm_para.h */
#define WALL_CLOCK_SIZE 12
#define CLOCK_SIZE      32
#define ASYNC_PF_SIZE   64
#define PV_EOI_SIZE     1
#define STEAL_TIME_SIZE 64

void kvm_arch_userfault_own_memory(CPUState *cpu, KVMUserfaultRangeFunc *fn,
                                   void *opaque)
{
    CPUX86State *env = &X86_CPU(cpu)->env;
    const struct {
        uint64_t msr;
        uint64_t enabled;   /* 0: if @msr is not 0 */
        uint64_t flags;     /* Bits that are not part of the address */
        hwaddr len;
    } shared[] = {
        { env->wall_clock_msr, 0, 0, WALL_CLOCK_SIZE },
        { env->system_time_msr, 1, 1, CLOCK_SIZE },
        { env->async_pf_en_msr, 1, 63, ASYNC_PF_SIZE },
        { env->pv_eoi_en_msr, 1, 3, PV_EOI_SIZE },
        { env->steal_time_msr, 1, 63, STEAL_TIME_SIZE },
        { env->msr_hv_hypercall, HV_PAGE_ENABLED, 4095, HV_PAGE_SIZE },
        { env->msr_hv_tsc, HV_PAGE_ENABLED, 4095, HV_PAGE_SIZE },
        { env->msr_hv_vapic, HV_PAGE_ENABLED, 4095, HV_PAGE_SIZE },
        { env->msr_hv_synic_evt_page, HV_PAGE_ENABLED, 4095, HV_PAGE_SIZE },
        { env->msr_hv_synic_msg_page, HV_PAGE_ENABLED, 4095, HV_PAGE_SIZE },
    };
    size_t i;

    for (i = 0; i < ARRAY_SIZE(shared); i++) {
        uint64_t msr = shared[i].msr;

        if (shared[i].enabled ? msr & shared[i].enabled : msr) {
            fn(msr & ~shared[i].flags, shared[i].len, opaque);
        }
    }
}
