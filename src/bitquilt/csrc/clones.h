// Plain loops compiled for several instruction sets; the loader picks one. For files without flags of their own.
#pragma once

// Not under the sanitizers: functions chosen at load time run before they do.
#if defined(BITQUILT_X86) && !defined(BITQUILT_SANITIZED)
#define BITQUILT_EVERY_ISA __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BITQUILT_EVERY_ISA
#endif
