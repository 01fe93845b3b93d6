/* Small networks in float32, run whole in one call: see program.py for the instructions, reference.py for what they compute.
 *
 * An instruction is a nest of five loops over strided operands. Weights lie in panels of 16 columns. _network.h is written with
 * vectors and compiled for AVX-512, for AVX2 and for any processor; the fitting version is run.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "_program.h"

#define NAME "shared_runtime.kernels.fused.program"
#define SPACES 32     /* constants, scratch, inputs, outputs */
#define LONG 300000 /* multiplications from which on other threads may run meanwhile */
#define SPARE 4000000 /* most floats of scratch that are kept for the next call */
#define ALIGNED 64

typedef struct {
    Steps steps;
    Py_ssize_t scratch, spaces, sizes[SPACES], work;
    float *constants;
    float *spare;      /* scratch that no call uses now; taken and given back under the GIL */
} Program;

static struct {
    const char *name;
    void (*execute)(const Steps *, float **);
    int here;
} versions[] = {{"any", fused_execute_any, 1}, {"avx2", fused_execute_avx2, 0}, {"avx512", fused_execute_avx512, 0}};

#define VERSIONS ((int)(sizeof(versions) / sizeof(versions[0])))

static int chosen = 0;

static void find_versions(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    versions[1].here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    versions[2].here = versions[1].here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    for (int i = 0; i < VERSIONS; i++)
        if (versions[i].here)
            chosen = i;
}

/* ---- Python ---- */

static void program_free(Program *p) {
    if (p == NULL)
        return;
    free(p->steps.instruction), free(p->constants), free(p->spare), free(p);
}

static void capsule_free(PyObject *capsule) {
    program_free(PyCapsule_GetPointer(capsule, NAME));
}

static float *floats(Py_ssize_t count) {
    size_t bytes = ((size_t)count * sizeof(float) / ALIGNED + 1) * ALIGNED;
    return aligned_alloc(ALIGNED, bytes);
}

/* Whether an operand stays inside its space in loops of these lengths. */
static int inside(const Program *p, const Operand *o, const int32_t *shape) {
    int64_t least = o->offset, most = o->offset;
    if (o->space < 0 || o->space >= p->spaces)
        return 0;
    for (int d = 0; d < DIMS; d++)
        *(o->stride[d] < 0 ? &least : &most) += (int64_t)o->stride[d] * (shape[d] - 1);
    return least >= 0 && most < p->sizes[o->space];
}

static int panels_inside(const Program *p, const Operand *o, int64_t columns, int64_t depth) {
    int64_t end = o->offset + (columns + LANES - 1) / LANES * LANES * depth;
    return o->space >= 0 && o->space < p->spaces && o->offset >= 0 && end <= p->sizes[o->space];
}

/* No instruction may reach outside of its spaces, whatever file the program was made of. */
static int sound(const Program *p, const Instruction *in) {
    int needs = in->kind == LSTM || in->kind == GRU ? 6 : in->kind == GEMM || in->kind == MATMUL ? 3 : in->kind >= ADD && in->kind <= MIN ? 3 : 2;
    if (in->kind < 0 || in->kind >= LAST || in->operands < needs || in->operands > (in->kind == GEMM ? 4 : needs))
        return 0;
    for (int d = 0; d < DIMS; d++)
        if (in->shape[d] < 1)
            return 0;
    if (needs == 6) {
        const Operand *o = in->operand;
        int lstm = in->kind == LSTM;
        int32_t gates = (lstm ? 4 : 3) * in->shape[2], batch = in->shape[1], hidden = in->shape[2];
        int32_t states[DIMS] = {in->shape[0], batch, hidden, 1, 1}, wide[DIMS] = {in->shape[0], batch, gates, 1, 1};
        int32_t first[DIMS] = {1, batch, hidden, 1, 1}, work[DIMS] = {1, 1, batch * gates, 1, 1}, bias[DIMS] = {1, 1, gates, 1, 1};
        for (int i = 0; i < 6; i++)
            if (i != 2 && o[i].stride[2] != 1)
                return 0;
        return hidden < 1 << 20 && (int64_t)batch * gates < 1 << 30 && o[0].space != CONSTANTS && o[4].space != CONSTANTS &&
               (!lstm || o[5].space != CONSTANTS) && inside(p, &o[0], states) && inside(p, &o[1], wide) &&
               panels_inside(p, &o[2], gates, hidden) && inside(p, &o[3], first) && inside(p, &o[4], work) &&
               inside(p, &o[5], lstm ? first : bias);
    }
    if (in->operand[0].space == CONSTANTS)
        return 0;
    if ((in->kind == SOFTMAX || in->kind == LOG_SOFTMAX) && (in->operand[0].stride[4] != 1 || in->operand[1].stride[4] != 1))
        return 0;
    if (in->kind == GEMM || in->kind == MATMUL)
        if (in->operand[0].stride[3] != 1 || in->operand[0].stride[4] != 0)
            return 0;
    if (in->kind == GEMM && (in->operand[1].stride[4] != 1 || (in->operands > 3 && in->operand[3].stride[3] != 1)))
        return 0;
    for (int i = 0; i < in->operands; i++)
        if (in->kind == GEMM && i == 2 ? !panels_inside(p, &in->operand[2], in->shape[3], in->shape[4]) : !inside(p, &in->operand[i], in->shape))
            return 0;
    return 1;
}

static void *copied(PyObject *source, Py_ssize_t item, Py_ssize_t *count, const char *what) {
    Py_buffer view;
    void *copy = NULL;
    if (PyObject_GetBuffer(source, &view, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    *count = view.len / item;
    if (view.len % item)
        PyErr_Format(PyExc_ValueError, "%s are %zd bytes, expected a multiple of %zd", what, view.len, item);
    else if ((copy = floats(view.len / (Py_ssize_t)sizeof(float))) == NULL)
        PyErr_NoMemory();
    else
        memcpy(copy, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return copy;
}

PyDoc_STRVAR(prepare_doc, "prepare(instructions, constants, scratch, sizes, work, /)\n--\n\nA program for `run`.");

static PyObject *prepare(PyObject *self, PyObject *args) {
    PyObject *instructions, *constants, *sizes;
    Program *p = calloc(1, sizeof(Program));
    if (p == NULL)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "OOnOn", &instructions, &constants, &p->scratch, &sizes, &p->work))
        goto failed;
    Py_ssize_t given = PyTuple_Size(sizes);
    if (given < 0)
        goto failed;
    if (given + GIVEN > SPACES || p->scratch < 0) {
        PyErr_Format(PyExc_ValueError, "%zd inputs and outputs, at most %d", given, SPACES - GIVEN);
        goto failed;
    }
    if ((p->steps.instruction = copied(instructions, sizeof(Instruction), &p->steps.instructions, "instructions")) == NULL ||
        (p->constants = copied(constants, sizeof(float), &p->sizes[CONSTANTS], "constants")) == NULL)
        goto failed;
    p->spaces = given + GIVEN;
    p->sizes[SCRATCH] = p->scratch;
    for (Py_ssize_t i = 0; i < given; i++)
        if ((p->sizes[GIVEN + i] = PyLong_AsSsize_t(PyTuple_GetItem(sizes, i))) < 0)
            goto failed;
    for (Py_ssize_t i = 0; i < p->steps.instructions; i++)
        if (!sound(p, &p->steps.instruction[i])) {
            PyErr_Format(PyExc_ValueError, "instruction %zd (kind %d) is not sound", i, p->steps.instruction[i].kind);
            goto failed;
        }
    PyObject *capsule = PyCapsule_New(p, NAME, capsule_free);
    if (capsule == NULL)
        goto failed;
    return capsule;
failed:
    program_free(p);
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "sizes of inputs and outputs are not natural numbers");
    return NULL;
}

/* Run on arrays; with `seconds`, an instruction at a time, adding to them how long each took. */
static PyObject *call(Program *p, PyObject *const *arrays, Py_ssize_t given, double *seconds) {
    if (given != p->spaces - GIVEN)
        return PyErr_Format(PyExc_ValueError, "%zd arrays, expected %zd", given, p->spaces - GIVEN);
    Py_buffer views[SPACES];
    float *base[SPACES], *scratch = NULL;
    Py_ssize_t held = 0;
    int failed = 1;
    for (; held < given; held++) {
        if (PyObject_GetBuffer(arrays[held], &views[held], PyBUF_C_CONTIGUOUS) < 0)
            goto done;
        base[GIVEN + held] = views[held].buf;
        if (views[held].len != p->sizes[GIVEN + held] * (Py_ssize_t)sizeof(float)) {
            PyErr_Format(PyExc_ValueError, "array %zd has %zd bytes, expected %zd floats", held, views[held].len, p->sizes[GIVEN + held]);
            held++;
            goto done;
        }
    }
    scratch = p->spare, p->spare = NULL;
    if (scratch == NULL && (scratch = floats(p->scratch)) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    base[CONSTANTS] = p->constants, base[SCRATCH] = scratch;
    void (*execute)(const Steps *, float **) = versions[chosen].execute;
    PyThreadState *state = p->work > LONG ? PyEval_SaveThread() : NULL;
    if (seconds == NULL)
        execute(&p->steps, base);
    else
        for (ptrdiff_t i = 0; i < p->steps.instructions; i++) {
            Steps one = {1, p->steps.instruction + i};
            struct timespec begin, end;
            timespec_get(&begin, TIME_UTC);
            execute(&one, base);
            timespec_get(&end, TIME_UTC);
            seconds[i] += (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
        }
    if (state != NULL)
        PyEval_RestoreThread(state);
    if (p->spare == NULL && p->scratch <= SPARE)
        p->spare = scratch;
    else
        free(scratch);
    failed = 0;
done:
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static Program *program_of(PyObject *const *args, Py_ssize_t given, Py_ssize_t least) {
    if (given >= least)
        return PyCapsule_GetPointer(args[0], NAME);
    PyErr_SetString(PyExc_TypeError, "a program is missing, or what to run it on");
    return NULL;
}

PyDoc_STRVAR(run_doc, "run(program, *arrays, /)\n--\n\nRun on contiguous float32 inputs, then outputs, of the sizes that were prepared.");

static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Program *p = program_of(args, given, 1);
    return p == NULL ? NULL : call(p, args + 1, given - 1, NULL);
}

PyDoc_STRVAR(timed_doc, "timed(program, seconds, *arrays, /)\n--\n\nAs `run`; add what each instruction took to `seconds`, float64.");

static PyObject *timed(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Program *p = program_of(args, given, 2);
    Py_buffer seconds;
    if (p == NULL || PyObject_GetBuffer(args[1], &seconds, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return NULL;
    PyObject *result = NULL;
    if (seconds.len != p->steps.instructions * (Py_ssize_t)sizeof(double))
        PyErr_Format(PyExc_ValueError, "%zd bytes for the seconds of %zd instructions", seconds.len, (Py_ssize_t)p->steps.instructions);
    else
        result = call(p, args + 2, given - 2, seconds.buf);
    PyBuffer_Release(&seconds);
    return result;
}

PyDoc_STRVAR(version_doc, "version(name=None, /)\n--\n\nWhich version of the kernel runs, after choosing another one where `name` is given.");

static PyObject *version(PyObject *self, PyObject *args) {
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|z", &name))
        return NULL;
    int found = name == NULL ? chosen : -1;
    for (int i = 0; name != NULL && i < VERSIONS; i++)
        if (versions[i].here && strcmp(versions[i].name, name) == 0)
            found = i;
    if (found < 0)
        return PyErr_Format(PyExc_ValueError, "no version %s of the kernel runs here", name);
    return PyUnicode_FromString(versions[chosen = found].name);
}

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_VARARGS, prepare_doc},
    {"version", version, METH_VARARGS, version_doc},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, run_doc},
    {"timed", (PyCFunction)(void (*)(void))timed, METH_FASTCALL, timed_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_cpu", .m_doc = "Small networks on a CPU.", .m_size = 0, .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    find_versions();
    return PyModuleDef_Init(&module);
}
