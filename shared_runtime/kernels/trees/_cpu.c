/* Scores of an ensemble of decision trees: see ensemble.py for the layout, reference.py for what is computed.
 *
 * Trees of a block walk down together, a level at a time: no step waits for another's, and none is a branch.
 * A leaf leads to itself. Rows go through a block in chunks, so that its nodes stay in the nearest cache.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NAME "shared_runtime.kernels.trees.ensemble"
#define ROWS 64   /* of a chunk */
#define TREES 64  /* of a block, at most */
#define LONG 100000 /* steps from which on other threads may run meanwhile */

enum { NONE, LOGISTIC, SOFTMAX, PAIR };

typedef struct {
    float threshold;   /* right where x >= threshold; infinite in a leaf */
    int32_t feature;
    int32_t left;      /* right is left + 1; a leaf is its own */
    int32_t missing;   /* 1 where NaN goes right */
} Node;

typedef struct {
    int32_t trees, depth;
} Block;

typedef struct {
    Py_ssize_t nodes, blocks, trees, features, targets, columns, steps;
    int post;
    double scale;      /* of the sum over the trees */
    Node *node;
    Block *block;
    int32_t *root;
    float *weight;     /* (nodes, targets) */
    double *base;      /* (targets) */
} Ensemble;

static void ensemble_free(Ensemble *e) {
    if (e == NULL)
        return;
    free(e->node), free(e->block), free(e->root), free(e->weight), free(e->base), free(e);
}

static void capsule_free(PyObject *capsule) {
    ensemble_free(PyCapsule_GetPointer(capsule, NAME));
}

/* A copy of a contiguous buffer, which must have `bytes`; NULL with an exception otherwise. */
static void *copied(PyObject *source, Py_ssize_t bytes, const char *what) {
    Py_buffer view;
    void *copy = NULL;
    if (PyObject_GetBuffer(source, &view, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    if (view.len != bytes)
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, expected %zd", what, view.len, bytes);
    else if ((copy = malloc(bytes ? (size_t)bytes : 1)) == NULL)
        PyErr_NoMemory();
    else
        memcpy(copy, view.buf, (size_t)bytes);
    PyBuffer_Release(&view);
    return copy;
}

/* Every step must stay inside: the file that the trees come from is not trusted. */
static int sound(const Ensemble *e) {
    for (Py_ssize_t i = 0; i < e->nodes; i++) {
        const Node *n = &e->node[i];
        if (n->feature < 0 || n->feature >= e->features || n->left < 0 || n->left >= e->nodes || (n->missing & ~1))
            return 0;
        int leaf = n->left == i;
        if (leaf ? !isinf(n->threshold) || n->threshold < 0 || n->missing : !isfinite(n->threshold) || n->left + 1 >= e->nodes)
            return 0;
    }
    Py_ssize_t trees = 0;
    for (Py_ssize_t b = 0; b < e->blocks; b++) {
        if (e->block[b].trees < 1 || e->block[b].trees > TREES || e->block[b].depth < 0)
            return 0;
        trees += e->block[b].trees;
    }
    for (Py_ssize_t t = 0; t < e->trees; t++)
        if (e->root[t] < 0 || e->root[t] >= e->nodes)
            return 0;
    return trees == e->trees;
}

PyDoc_STRVAR(prepare_doc, "prepare(nodes, blocks, roots, weights, base, features, post, scale, /)\n--\n\nAn ensemble for `run`.");

static PyObject *prepare(PyObject *self, PyObject *args) {
    PyObject *nodes, *blocks, *roots, *weights, *base;
    Ensemble *e = calloc(1, sizeof(Ensemble));
    if (e == NULL)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "OOOOOnid", &nodes, &blocks, &roots, &weights, &base, &e->features, &e->post, &e->scale))
        goto failed;
    Py_ssize_t sizes[4];
    PyObject *sources[4] = {nodes, blocks, roots, base};
    for (int i = 0; i < 4; i++)
        if ((sizes[i] = PyObject_Size(sources[i])) < 0)
            goto failed;
    e->nodes = sizes[0], e->blocks = sizes[1], e->trees = sizes[2], e->targets = sizes[3];
    e->columns = e->post == PAIR ? 2 : e->targets;
    if (e->features < 1 || e->targets < 1 || e->post < NONE || e->post > PAIR || (e->post == PAIR && e->targets != 1)) {
        PyErr_SetString(PyExc_ValueError, "no features, no targets or an unknown transform");
        goto failed;
    }
    if ((e->node = copied(nodes, e->nodes * (Py_ssize_t)sizeof(Node), "nodes")) == NULL ||
        (e->block = copied(blocks, e->blocks * (Py_ssize_t)sizeof(Block), "blocks")) == NULL ||
        (e->root = copied(roots, e->trees * (Py_ssize_t)sizeof(int32_t), "roots")) == NULL ||
        (e->weight = copied(weights, e->nodes * e->targets * (Py_ssize_t)sizeof(float), "weights")) == NULL ||
        (e->base = copied(base, e->targets * (Py_ssize_t)sizeof(double), "base")) == NULL)
        goto failed;
    if (!sound(e)) {
        PyErr_SetString(PyExc_ValueError, "a node, a root or a block of the ensemble leads outside of it");
        goto failed;
    }
    for (Py_ssize_t b = 0; b < e->blocks; b++)
        e->steps += (Py_ssize_t)e->block[b].trees * (e->block[b].depth + 1);
    PyObject *capsule = PyCapsule_New(e, NAME, capsule_free);
    if (capsule == NULL)
        goto failed;
    return capsule;
failed:
    ensemble_free(e);
    return NULL;
}

static void walk(const Node *node, int32_t *at, int32_t trees, int32_t depth, const float *row, int missing) {
    for (int32_t level = 0; level < depth; level++) {
        if (missing)
            for (int32_t t = 0; t < trees; t++) {
                const Node *n = &node[at[t]];
                float x = row[n->feature];
                at[t] = n->left + (x != x ? n->missing : x >= n->threshold);
            }
        else
            for (int32_t t = 0; t < trees; t++) {
                const Node *n = &node[at[t]];
                at[t] = n->left + (row[n->feature] >= n->threshold);
            }
    }
}

static void transform(const Ensemble *e, const double *sum, float *out) {
    double most = -INFINITY, total = 0;
    for (Py_ssize_t k = 0; k < e->targets; k++) {
        double score = sum[k] * e->scale + e->base[k];
        if (e->post == LOGISTIC || e->post == PAIR)
            score = 1 / (1 + exp(-score));
        out[e->post == PAIR ? 1 : k] = (float)score;
        most = score > most ? score : most;
    }
    if (e->post == PAIR)
        out[0] = 1 - out[1];
    if (e->post != SOFTMAX)
        return;
    for (Py_ssize_t k = 0; k < e->targets; k++)
        total += exp(sum[k] * e->scale + e->base[k] - most);
    for (Py_ssize_t k = 0; k < e->targets; k++)
        out[k] = (float)(exp(sum[k] * e->scale + e->base[k] - most) / total);
}

/* `rows` holds a chunk with what is infinite made finite, so that no leaf is left; `missing` which of them hold NaN. */
static void chunk(const Ensemble *e, const float *x, Py_ssize_t n, float *out, float *rows, double *sums) {
    int32_t at[TREES];
    char missing[ROWS];
    for (Py_ssize_t r = 0; r < n; r++) {
        missing[r] = 0;
        for (Py_ssize_t f = 0; f < e->features; f++) {
            float value = x[r * e->features + f];
            missing[r] |= value != value;
            rows[r * e->features + f] = value > FLT_MAX ? FLT_MAX : value;
        }
    }
    memset(sums, 0, (size_t)(n * e->targets) * sizeof(double));
    const int32_t *root = e->root;
    for (Py_ssize_t b = 0; b < e->blocks; root += e->block[b++].trees)
        for (Py_ssize_t r = 0; r < n; r++) {
            int32_t trees = e->block[b].trees;
            memcpy(at, root, (size_t)trees * sizeof(int32_t));
            walk(e->node, at, trees, e->block[b].depth, rows + r * e->features, missing[r]);
            double *sum = sums + r * e->targets;
            if (e->targets == 1)
                for (int32_t t = 0; t < trees; t++)
                    sum[0] += e->weight[at[t]];
            else
                for (int32_t t = 0; t < trees; t++)
                    for (Py_ssize_t k = 0; k < e->targets; k++)
                        sum[k] += e->weight[at[t] * e->targets + k];
        }
    for (Py_ssize_t r = 0; r < n; r++)
        transform(e, sums + r * e->targets, out + r * e->columns);
}

PyDoc_STRVAR(run_doc, "run(ensemble, x, out, /)\n--\n\nWrite what the rows of `x` (N, features) score into `out` (N, columns), both float32.");

static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "run takes an ensemble, rows and a buffer for their scores");
        return NULL;
    }
    const Ensemble *e = PyCapsule_GetPointer(args[0], NAME);
    if (e == NULL)
        return NULL;
    Py_buffer x, out;
    if (PyObject_GetBuffer(args[1], &x, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[2], &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&x);
        return NULL;
    }
    Py_ssize_t width = e->features * (Py_ssize_t)sizeof(float), wide = e->columns * (Py_ssize_t)sizeof(float), n = x.len / width;
    int failed = 1;
    if (x.itemsize != sizeof(float) || out.itemsize != sizeof(float) || n * width != x.len || n * wide != out.len) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of rows and %zd of scores, expected %zd and %zd for each row", x.len, out.len, width, wide);
        goto done;
    }
    Py_ssize_t most = n < ROWS ? n : ROWS;
    double *sums = malloc((size_t)(most * e->targets) * sizeof(double) + (size_t)(most * width) + 1);
    if (sums == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    float *rows = (float *)(sums + most * e->targets);
    PyThreadState *state = n * e->steps > LONG ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t r = 0; r < n; r += ROWS)
        chunk(e, (const float *)x.buf + r * e->features, n - r < ROWS ? n - r : ROWS, (float *)out.buf + r * e->columns, rows, sums);
    if (state != NULL)
        PyEval_RestoreThread(state);
    free(sums);
    failed = 0;
done:
    PyBuffer_Release(&x);
    PyBuffer_Release(&out);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_VARARGS, prepare_doc},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, run_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_cpu", .m_doc = "Decision trees on a CPU.", .m_size = 0, .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    return PyModuleDef_Init(&module);
}
