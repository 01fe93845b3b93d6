/* AVX-512. */
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#define WIDTH 16
#define EXECUTE fused_execute_avx512
#include "_network.h"
#else
#include "_program.h"

void fused_execute_avx512(const Steps *steps, float **base) { /* never chosen */ }
#endif
