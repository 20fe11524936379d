// Loops that are several times as fast in wide registers. A package is built for any x86-64, so the
// compiler makes such a function more than once and the machine chooses when it loads the module.

#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define AVMAE_WIDE __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 8
#define AVMAE_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define AVMAE_WIDE
#endif
