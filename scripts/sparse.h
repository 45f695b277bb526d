/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What Debian 12's sparse does not know of the C that the kernel is written
 * in; included before each file that it checks. The kernel does not run a
 * sparse without the first at all, and after an error, such as the second
 * causes in each MODULE_AUTHOR(), sparse keeps every later warning to itself.
 */
#define __typeof_unqual__ __typeof__
#define __builtin_strlen(s) (sizeof(s) - 1)
