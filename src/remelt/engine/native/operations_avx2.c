/* The operations for processors with AVX2, whatever the machine is that compiles them. */
#include "language.h"

#if REMELT_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif

#include "lanes_avx2.h"

#define CAPABILITY avx2
#include "operations.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_for_this_machine;
#endif
