/* A program: see program.py for its instructions, reference.py for what they compute. */
#include <stddef.h>
#include <stdint.h>

#define DIMS 5
#define OPERANDS 7
#define LANES 16

enum {
    COPY, NEG, ABS, SQRT, RECIPROCAL, RELU, LEAKY_RELU, EXP, SIGMOID, TANH, SIGN, LOG, ELU, SOFTPLUS, ERF, GELU, FLOOR, HARD_SIGMOID,
    ADD, SUB, MUL, DIV, POW, MAX, MIN,
    SUM, MEAN, GREATEST, LEAST, SOFTMAX, LOG_SOFTMAX,
    GEMM, MATMUL, LSTM, GRU, LAST
};
enum { CONSTANTS, SCRATCH, GIVEN };

typedef struct {
    int32_t space, offset, stride[DIMS];
} Operand;

typedef struct {
    int32_t kind, flag /* recurrent layers: from the last step on */, shape[DIMS], operands;
    Operand operand[OPERANDS];
    float alpha, beta;
} Instruction;

typedef struct {
    ptrdiff_t instructions;
    Instruction *instruction;
} Steps;

/* One version for each set of processor instructions; `base` are the addresses of the spaces. */
void fused_execute_any(const Steps *steps, float **base);
void fused_execute_avx2(const Steps *steps, float **base);
void fused_execute_avx512(const Steps *steps, float **base);
