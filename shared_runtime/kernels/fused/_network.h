/* What the instructions of a program do.
 *
 * Included by a file for each set of processor instructions: TARGET tells the compiler which, WIDTH is the number of floats of
 * its vectors, EXECUTE the function's name.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "_program.h"

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 12")
#endif
#define INLINE TARGET static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4)));
#define VECTORS (LANES / WIDTH) /* of a panel's row */

/* ---- a vector at a time ---- */

#define SPLAT(value) ((vec){0} + (value))

INLINE vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* The first `n` numbers, if there are so many; zeros behind them. */
INLINE vec load(const float *from, int32_t n) {
    vec x = {0};
    if (n >= WIDTH)
        return *(const vec *)from;
    if (n > 0)
        memcpy(&x, from, (size_t)n * sizeof(float));
    return x;
}

INLINE void store(float *to, vec x, int32_t n) {
    if (n >= WIDTH)
        *(vec *)to = x;
    else if (n > 0)
        memcpy(to, &x, (size_t)n * sizeof(float));
}

/* e^r by its series, |r| <= log(2) / 2, of x = k log(2) + r; `whole` becomes k. */
INLINE vec mantissa(vec x, ints *whole) {
    vec shifted = x * 1.44269504f + 12582912.f, k = shifted - 12582912.f, r = x - k * 0.693359375f + k * 2.12194440e-4f;
    *whole = (ints)shifted - 0x4B400000;
    return 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r * (1.f / 5040)))))));
}

INLINE vec between(vec x, float least, float most) {
    x = choose(x > SPLAT(most), SPLAT(most), x); /* NaN stays */
    return choose(x < SPLAT(least), SPLAT(least), x);
}

INLINE vec vec_exp(vec x) {
    ints whole;
    vec e = mantissa(between(x, -104, 89), &whole);
    ints half = whole >> 1;
    return e * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
}

/* e^x where it is neither tiny nor huge. */
INLINE vec vec_bounded_exp(vec x, float most) {
    ints whole;
    vec e = mantissa(between(x, -most, most), &whole);
    return e * (vec)((whole + 127) << 23);
}

INLINE vec vec_sigmoid(vec x) { return 1 / (1 + vec_exp(-x)); }

/* sigmoid(x) tanh(y) in one division; what is lost of tanh near zero is less than 1e-7. */
INLINE vec vec_gated(vec x, vec y) {
    vec e = vec_bounded_exp(-2 * y, 40);
    return (1 - e) / ((1 + vec_bounded_exp(-x, 80)) * (1 + e));
}

/* (1 - e^-2|x|) / (1 + e^-2|x|); by its series near zero, where that loses digits. */
INLINE vec vec_tanh(vec x) {
    vec e = vec_exp(-2 * (vec)((ints)x & 0x7FFFFFFF)), big = (1 - e) / (1 + e), s = x * x;
    vec small = x * (1 + s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835)))));
    big = (vec)((ints)big | ((ints)x & (int32_t)0x80000000));
    return choose(s < SPLAT(.0625f), small, big);
}

/* x = 2^k m with m about 1: k log(2) + 2 atanh((m - 1) / (m + 1)). */
INLINE vec vec_log(vec x) {
    ints tiny = x < SPLAT(1.17549435e-38f);
    vec scaled = choose(tiny, x * 8388608.f, x);
    ints k = ((ints)scaled - 0x3F3504F3) >> 23;
    vec m = (vec)((ints)scaled - (k << 23)), s = (m - 1) / (m + 1), q = s * s;
    vec whole = __builtin_convertvector(k - (tiny & 23), vec), y = 2 * s * (1 + q * (1.f / 3 + q * (1.f / 5 + q * (1.f / 7 + q * (1.f / 9)))));
    y += whole * -2.12194440e-4f;
    y += whole * 0.693359375f;
    y = choose(x > SPLAT(3.4028235e38f), x, y);
    y = choose(x == SPLAT(0), SPLAT(-INFINITY), y);
    return choose((x < SPLAT(0)) | (x != x), SPLAT(NAN), y);
}

/* ---- nests of loops ---- */

#define POINTER(i) (base[in->operand[i].space] + in->operand[i].offset)
#define STRIDE(i, d) ((ptrdiff_t)in->operand[i].stride[d])

#define NEST(...)                                                                                                                         \
    for (int32_t i0 = 0; i0 < in->shape[0]; i0++)                                                                                         \
        for (int32_t i1 = 0; i1 < in->shape[1]; i1++)                                                                                     \
            for (int32_t i2 = 0; i2 < in->shape[2]; i2++)                                                                                 \
                for (int32_t i3 = 0; i3 < in->shape[3]; i3++)                                                                             \
                    __VA_ARGS__

#define AT(i) (POINTER(i) + i0 * STRIDE(i, 0) + i1 * STRIDE(i, 1) + i2 * STRIDE(i, 2) + i3 * STRIDE(i, 3))

#define UNARY(expression)                                                                                                                 \
    NEST({                                                                                                                                \
        float *restrict to = AT(0);                                                                                                       \
        const float *restrict from = AT(1);                                                                                               \
        if (st == 1 && sa == 1)                                                                                                           \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float x = from[i];                                                                                                        \
                to[i] = expression;                                                                                                       \
            }                                                                                                                             \
        else                                                                                                                              \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float x = from[i * sa];                                                                                                   \
                to[i * st] = expression;                                                                                                  \
            }                                                                                                                             \
    })

INLINE vec curve(int32_t kind, vec x) { return kind == EXP ? vec_exp(x) : kind == SIGMOID ? vec_sigmoid(x) : kind == TANH ? vec_tanh(x) : vec_log(x); }

INLINE void curves(const Instruction *in, float **base) {
    const int32_t n = in->shape[4];
    const ptrdiff_t st = STRIDE(0, 4), sa = STRIDE(1, 4);
    NEST({
        float *to = AT(0);
        const float *from = AT(1);
        for (int32_t i = 0; i < n; i += WIDTH) {
            int32_t some = n - i < WIDTH ? n - i : WIDTH;
            vec x = {0};
            if (sa == 1)
                x = load(from + i, some);
            else
                for (int32_t j = 0; j < some; j++)
                    x[j] = from[(i + j) * sa];
            x = curve(in->kind, x);
            if (st == 1)
                store(to + i, x, some);
            else
                for (int32_t j = 0; j < some; j++)
                    to[(i + j) * st] = x[j];
        }
    })
}

/* What has no fast form of its own, one at a time by the C library. */
INLINE float scalar(int32_t kind, float x, float alpha, float beta) {
    switch (kind) {
    case ELU: return x < 0 ? alpha * expm1f(x) : x;
    case SOFTPLUS: return x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x));
    case ERF: return erff(x);
    case GELU: return .5f * x * (1 + erff(x * .70710678f));
    case FLOOR: return floorf(x);
    default: x = alpha * x + beta; return x < 0 ? 0 : x > 1 ? 1 : x; /* HARD_SIGMOID */
    }
}

#define BINARY(expression)                                                                                                                \
    NEST({                                                                                                                                \
        float *restrict to = AT(0);                                                                                                       \
        const float *restrict left = AT(1), *restrict right = AT(2);                                                                      \
        if (st == 1 && sa == 1 && sb == 1)                                                                                                \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float x = left[i], y = right[i];                                                                                          \
                to[i] = expression;                                                                                                       \
            }                                                                                                                             \
        else if (st == 1 && sa == 1 && sb == 0) {                                                                                         \
            float y = right[0];                                                                                                           \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float x = left[i];                                                                                                        \
                to[i] = expression;                                                                                                       \
            }                                                                                                                             \
        } else if (st == 1 && sa == 0 && sb == 1) {                                                                                       \
            float x = left[0];                                                                                                            \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float y = right[i];                                                                                                       \
                to[i] = expression;                                                                                                       \
            }                                                                                                                             \
        } else                                                                                                                            \
            for (int32_t i = 0; i < n; i++) {                                                                                             \
                float x = left[i * sa], y = right[i * sb];                                                                                \
                to[i * st] = expression;                                                                                                  \
            }                                                                                                                             \
    })

INLINE void reduce(const Instruction *in, float **base) {
    ptrdiff_t sa = STRIDE(1, 4);
    int32_t n = in->shape[4];
    NEST({
        const float *from = AT(1);
        float some[LANES], all;
        int32_t lanes = n < LANES ? n : LANES, i = lanes;
        for (int32_t j = 0; j < lanes; j++)
            some[j] = from[j * sa];
        if (in->kind == SUM || in->kind == MEAN) {
            for (; i + LANES <= n; i += LANES)
                for (int32_t j = 0; j < LANES; j++)
                    some[j] += from[(i + j) * sa];
            for (int32_t j = 0; i < n; i++, j++)
                some[j] += from[i * sa];
            all = some[0];
            for (int32_t j = 1; j < lanes; j++)
                all += some[j];
            if (in->kind == MEAN)
                all /= (float)n;
        } else {
            float sign = in->kind == GREATEST ? 1.f : -1.f;
            all = from[0];
            for (i = 1; i < n; i++) {
                float x = from[i * sa];
                all = sign * x > sign * all || x != x ? x : all;
            }
        }
        *AT(0) = all;
    })
}

INLINE void softmax(const Instruction *in, float **base) {
    int32_t n = in->shape[4];
    NEST({
        const float *from = AT(1);
        float *to = AT(0), most = from[0], total = 0;
        for (int32_t i = 1; i < n; i++)
            most = from[i] > most || from[i] != from[i] ? from[i] : most;
        for (int32_t i = 0; i < n; i += WIDTH) {
            vec e = vec_exp(load(from + i, n - i) - most);
            for (int32_t j = 0; j < WIDTH && j < n - i; j++)
                total += e[j];
            store(to + i, e, n - i);
        }
        if (in->kind == SOFTMAX)
            for (int32_t i = 0; i < n; i++)
                to[i] /= total;
        else
            for (int32_t i = 0; i < n; i++)
                to[i] = from[i] - most - logf(total);
    })
}

/* ---- products with weights in panels ---- */

/* `rows` rows of C (columns of `panels` panels, `columns` of them) = start + A B; both counts are constants where it is inlined. */
INLINE void tile(const int rows, const int panels, const float *a, ptrdiff_t lda, const float *b, int32_t depth, const float *start,
                 ptrdiff_t lds, float *c, ptrdiff_t ldc, int32_t columns) {
    const int vectors = panels * VECTORS;
    vec sum[6][3 * VECTORS], more[3 * VECTORS];
UNROLL
    for (int p = 0; p < vectors; p++) {
        more[p] = SPLAT(0);
UNROLL
        for (int m = 0; m < rows; m++)
            sum[m][p] = start == NULL ? SPLAT(0) : load(start + m * lds + p * WIDTH, columns - p * WIDTH);
    }
#define WEIGHTS(p, k) (*(const vec *)(b + ((ptrdiff_t)((p) / VECTORS) * depth + (k)) * LANES + (p) % VECTORS * WIDTH))
    int32_t k = 0;
    if (rows == 1) /* two chains of sums: one would wait for itself */
        for (; k + 2 <= depth; k += 2)
UNROLL
            for (int p = 0; p < vectors; p++) {
                sum[0][p] += a[k] * WEIGHTS(p, k);
                more[p] += a[k + 1] * WEIGHTS(p, k + 1);
            }
    for (; k < depth; k++)
        if (rows > vectors) { /* as many operands as there can be stay in registers */
            vec weights[3 * VECTORS];
UNROLL
            for (int p = 0; p < vectors; p++)
                weights[p] = WEIGHTS(p, k);
UNROLL
            for (int m = 0; m < rows; m++)
UNROLL
                for (int p = 0; p < vectors; p++)
                    sum[m][p] += a[m * lda + k] * weights[p];
        } else
UNROLL
            for (int p = 0; p < vectors; p++) {
                vec weights = WEIGHTS(p, k);
UNROLL
                for (int m = 0; m < rows; m++)
                    sum[m][p] += a[m * lda + k] * weights;
            }
UNROLL
    for (int m = 0; m < rows; m++)
UNROLL
        for (int p = 0; p < vectors; p++)
            store(c + m * ldc + p * WIDTH, rows == 1 ? sum[m][p] + more[p] : sum[m][p], columns - p * WIDTH);
#undef WEIGHTS
}

/* C (rows, columns) = start + A (rows, depth) B; `b` in panels, `start` may be NULL. */
TARGET static void gemm(int32_t rows, int32_t columns, int32_t depth, const float *a, ptrdiff_t lda, const float *b, const float *start,
                 ptrdiff_t lds, float *c, ptrdiff_t ldc) {
    int32_t m = 0;
#define STRIP(count, wide)                                                                                                                \
    for (int32_t n = 0; n < columns;) {                                                                                                   \
        int32_t left = columns - n;                                                                                                       \
        const float *panel = b + (ptrdiff_t)n * depth, *s = start == NULL ? NULL : start + m * lds + n;                                   \
        if (wide >= 3 && left > 2 * LANES) {                                                                                              \
            tile(count, 3, a + m * lda, lda, panel, depth, s, lds, c + m * ldc + n, ldc, left);                               \
            n += 3 * LANES;                                                                                                               \
        } else {                                                                                                                          \
            tile(count, 1, a + m * lda, lda, panel, depth, s, lds, c + m * ldc + n, ldc, left);                                           \
            n += LANES;                                                                                                                   \
        }                                                                                                                                 \
    }
    for (; m + 6 <= rows; m += 6)
        STRIP(6, 1)
    for (; m + 4 <= rows; m += 4)
        STRIP(4, 1)
    for (; m + 2 <= rows; m += 2)
        STRIP(2, 3)
    for (; m < rows; m++)
        STRIP(1, 3)
#undef STRIP
}

/* Operands C, A, B in panels and, if there is a fourth, what the sums start from; loops batch, batch, rows, columns, depth. */
INLINE void packed(const Instruction *in, float **base) {
    const float *b = POINTER(2);
    for (int32_t i0 = 0; i0 < in->shape[0]; i0++)
        for (int32_t i1 = 0; i1 < in->shape[1]; i1++) {
            float *c = POINTER(0) + i0 * STRIDE(0, 0) + i1 * STRIDE(0, 1);
            const float *a = POINTER(1) + i0 * STRIDE(1, 0) + i1 * STRIDE(1, 1);
            const float *start = in->operands > 3 ? POINTER(3) + i0 * STRIDE(3, 0) + i1 * STRIDE(3, 1) : NULL;
            gemm(in->shape[2], in->shape[3], in->shape[4], a, STRIDE(1, 2), b, start, in->operands > 3 ? STRIDE(3, 2) : 0, c, STRIDE(0, 2));
        }
}

/* The same with B as it lies. */
INLINE void matmul(const Instruction *in, float **base) {
    int32_t columns = in->shape[3], depth = in->shape[4];
    ptrdiff_t ka = STRIDE(1, 4), kb = STRIDE(2, 4), nb = STRIDE(2, 3);
    for (int32_t i0 = 0; i0 < in->shape[0]; i0++)
        for (int32_t i1 = 0; i1 < in->shape[1]; i1++)
            for (int32_t m = 0; m < in->shape[2]; m++) {
                float *restrict c = POINTER(0) + i0 * STRIDE(0, 0) + i1 * STRIDE(0, 1) + m * STRIDE(0, 2);
                const float *restrict a = POINTER(1) + i0 * STRIDE(1, 0) + i1 * STRIDE(1, 1) + m * STRIDE(1, 2);
                const float *restrict b = POINTER(2) + i0 * STRIDE(2, 0) + i1 * STRIDE(2, 1);
                if (nb == 1 && columns > 1) {
                    for (int32_t n = 0; n < columns; n++)
                        c[n] = 0;
                    for (int32_t k = 0; k < depth; k++) {
                        float x = a[k * ka];
                        for (int32_t n = 0; n < columns; n++)
                            c[n] += x * b[k * kb + n];
                    }
                } else
                    for (int32_t n = 0; n < columns; n++) {
                        vec sum = {0};
                        float all = 0;
                        int32_t k = 0;
                        if (ka == 1 && kb == 1)
                            for (; k + WIDTH <= depth; k += WIDTH)
                                sum += *(const vec *)(a + k) * *(const vec *)(b + n * nb + k);
                        for (int32_t j = 0; j < WIDTH; j++)
                            all += sum[j];
                        for (; k < depth; k++)
                            all += a[k * ka] * b[k * kb + n * nb];
                        c[n] = all;
                    }
            }
}

/* Loops time, batch, hidden. Operands: states (time, batch, hidden), x W + b (time, batch, gates), R in panels, first state
 * (batch, hidden), scratch for the gates (batch, gates); then cells (batch, hidden), which begin as the first ones, or the
 * bias of the recurrent product. `flag`: from the last step to the first. Gates in the order of ONNX: i o f c, z r h. */
INLINE void recurrent(const Instruction *in, float **base) {
    const int lstm = in->kind == LSTM;
    int32_t steps = in->shape[0], batch = in->shape[1], hidden = in->shape[2], gates = (lstm ? 4 : 3) * hidden;
    const float *before = POINTER(3);
    ptrdiff_t ahead = STRIDE(3, 1);
    float *work = POINTER(4);
    for (int32_t step = 0; step < steps; step++) {
        int32_t t = in->flag ? steps - 1 - step : step;
        float *state = POINTER(0) + t * STRIDE(0, 0);
        const float *given = POINTER(1) + t * STRIDE(1, 0);
        if (lstm)
            gemm(batch, gates, hidden, before, ahead, POINTER(2), given, STRIDE(1, 1), work, gates);
        else
            gemm(batch, gates, hidden, before, ahead, POINTER(2), POINTER(5), 0, work, gates);
        for (int32_t r = 0; r < batch; r++) {
            const float *g = work + (ptrdiff_t)r * gates, *x = given + r * STRIDE(1, 1), *h = before + r * ahead;
            float *out = state + r * STRIDE(0, 1), *cell = POINTER(5) + r * STRIDE(5, 1);
            for (int32_t j = 0; j < hidden; j += WIDTH) {
                int32_t n = hidden - j;
                if (lstm) {
                    vec c = load(cell + j, n) / (1 + vec_bounded_exp(-load(g + 2 * hidden + j, n), 80));
                    c += vec_gated(load(g + j, n), load(g + 3 * hidden + j, n));
                    store(cell + j, c, n);
                    store(out + j, vec_gated(load(g + hidden + j, n), c), n);
                } else {
                    vec z = vec_sigmoid(load(g + j, n) + load(x + j, n)), reset = vec_sigmoid(load(g + hidden + j, n) + load(x + hidden + j, n));
                    vec next = vec_tanh(load(x + 2 * hidden + j, n) + reset * load(g + 2 * hidden + j, n));
                    store(out + j, next + z * (load(h + j, n) - next), n);
                }
            }
        }
        before = state, ahead = STRIDE(0, 1);
    }
}

TARGET void EXECUTE(const Steps *steps, float **base) {
    for (ptrdiff_t at = 0; at < steps->instructions; at++) {
        const Instruction *in = &steps->instruction[at];
        const int32_t n = in->shape[4];
        const ptrdiff_t st = STRIDE(0, 4), sa = STRIDE(1, 4), sb = STRIDE(2, 4);
        const float alpha = in->alpha, beta = in->beta;
        switch (in->kind) {
        case COPY: UNARY(x); break;
        case NEG: UNARY(-x); break;
        case ABS: UNARY(fabsf(x)); break;
        case SQRT: UNARY(sqrtf(x)); break;
        case RECIPROCAL: UNARY(1 / x); break;
        case RELU: UNARY(x < 0 ? 0 : x); break;
        case LEAKY_RELU: UNARY(x < 0 ? alpha * x : x); break;
        case SIGN: UNARY(x > 0 ? 1.f : x < 0 ? -1.f : x); break;
        case EXP: case SIGMOID: case TANH: case LOG: curves(in, base); break;
        case ELU: case SOFTPLUS: case ERF: case GELU: case FLOOR: case HARD_SIGMOID:
            UNARY(scalar(in->kind, x, alpha, beta)); break;
        case ADD: BINARY(x + y); break;
        case SUB: BINARY(x - y); break;
        case MUL: BINARY(x * y); break;
        case DIV: BINARY(x / y); break;
        case POW: BINARY(powf(x, y)); break;
        case MAX: BINARY(x > y || x != x ? x : y); break;
        case MIN: BINARY(x < y || x != x ? x : y); break;
        case SUM: case MEAN: case GREATEST: case LEAST: reduce(in, base); break;
        case SOFTMAX: case LOG_SOFTMAX: softmax(in, base); break;
        case GEMM: packed(in, base); break;
        case MATMUL: matmul(in, base); break;
        case LSTM: case GRU: recurrent(in, base); break;
        }
    }
}
