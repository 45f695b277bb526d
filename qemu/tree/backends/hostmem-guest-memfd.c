/*
 * QEMU host guest_memfd memory backend
 *
 * Memory that KVM maps into the guest straight from a file of its own, a
 * guest_memfd, and that is shared with QEMU: QEMU maps it like any other file.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/module.h"
#include "qom/object.h"
#include "system/hostmem.h"
#include "system/kvm-guest-memfd.h"

OBJECT_DECLARE_SIMPLE_TYPE(HostMemoryBackendGuestMemfd,
                           MEMORY_BACKEND_GUEST_MEMFD)

struct HostMemoryBackendGuestMemfd {
    HostMemoryBackend parent_obj;
};

static bool
guest_memfd_backend_memory_alloc(HostMemoryBackend *backend, Error **errp)
{
    g_autofree char *name = host_memory_backend_get_name(backend);
    uint32_t ram_flags = RAM_SHARED;
    int fd;

    if (!backend->size) {
        error_setg(errp, "can't create backend with size 0");
        return false;
    }
    if (!QEMU_IS_ALIGNED(backend->size, qemu_real_host_page_size())) {
        error_setg(errp, "the size of a guest_memfd must be a multiple of %"
                   PRIuPTR " bytes", qemu_real_host_page_size());
        return false;
    }
    if (!backend->share) {
        error_setg(errp, "a guest_memfd can't be mapped with share=off");
        return false;
    }
    if (backend->guest_memfd) {
        error_setg(errp, "this machine needs private memory, which "
                   TYPE_MEMORY_BACKEND_GUEST_MEMFD " is not");
        return false;
    }

    fd = kvm_guest_memfd_create_shared(backend->size, errp);
    if (fd < 0) {
        return false;
    }

    backend->aligned = true;
    ram_flags |= backend->reserve ? 0 : RAM_NORESERVE;
    if (!memory_region_init_ram_from_fd(&backend->mr, OBJECT(backend), name,
                                        backend->size, ram_flags, fd, 0,
                                        errp)) {
        close(fd);
        return false;
    }
    return true;
}

static void guest_memfd_backend_instance_init(Object *obj)
{
    MEMORY_BACKEND(obj)->share = true;
}

static void guest_memfd_backend_class_init(ObjectClass *oc, const void *data)
{
    MEMORY_BACKEND_CLASS(oc)->alloc = guest_memfd_backend_memory_alloc;
}

static const TypeInfo guest_memfd_backend_info = {
    .name = TYPE_MEMORY_BACKEND_GUEST_MEMFD,
    .parent = TYPE_MEMORY_BACKEND,
    .instance_init = guest_memfd_backend_instance_init,
    .class_init = guest_memfd_backend_class_init,
    .instance_size = sizeof(HostMemoryBackendGuestMemfd),
};

static void register_types(void)
{
    type_register_static(&guest_memfd_backend_info);
}

type_init(register_types);
