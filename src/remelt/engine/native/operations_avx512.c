/* The operations for processors with AVX-512, whatever the machine is that compiles them. */
#include "language.h"

#if REMELT_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))),              \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "lanes_avx512.h"

#define CAPABILITY avx512
#include "operations.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_for_this_machine;
#endif
