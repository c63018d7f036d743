/* What the C kernels share. A kernel that comes in float and in double is a template over REAL in a file that includes itself twice:
 * NAME(f) is f_float in the first pass and f_double in the second. */
#ifndef FOVEAL_NATIVE_H
#define FOVEAL_NATIVE_H

/* One library for every x86-64: the loader picks the widest form the processor has. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define JOIN_(name, type) name##_##type
#define JOIN(name, type) JOIN_(name, type)
#define NAME(name) JOIN(name, REAL)

#endif
