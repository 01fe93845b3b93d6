/* AVX2 with FMA. */
#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define EXECUTE fused_execute_avx2
#include "_network.h"
#else
#include "_program.h"

void fused_execute_avx2(const Steps *steps, float **base) { /* never chosen */ }
#endif
