/* The objects that Python sees: checked programs, and what their calls found. */
#include "interface.h"

#include <stdlib.h>
#include <string.h>

/* ---- Program. ---- */

static int count_argument(size_t *out, Py_ssize_t value, size_t most, const char *what)
{
    if (value < 0 || (size_t)value > most) {
        PyErr_Format(PyExc_ValueError, "a program has 0 to %zu %s, but got %zd", most, what, value);
        return -1;
    }
    *out = (size_t)value;
    return 0;
}

static int program_copy(struct program *program, const Py_buffer *view)
{
    if (view->len % (Py_ssize_t)sizeof(struct instruction)) {
        PyErr_Format(PyExc_ValueError, "an instruction is 8 numbers of 16 bits, but got %zd bytes", view->len);
        return -1;
    }
    program->length = (size_t)view->len / sizeof(struct instruction);
    if (program->length > MOST_INSTRUCTIONS) {
        PyErr_Format(PyExc_ValueError, "a program has at most %d instructions, but got %zu", MOST_INSTRUCTIONS,
                     program->length);
        return -1;
    }
    program->instructions = malloc((size_t)view->len + 1);
    if (!program->instructions) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(program->instructions, view->buf, (size_t)view->len);
    return 0;
}

static PyObject *program_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"instructions", "registers", "numbers", "inputs", "outputs", "accumulators",
                            "histograms", NULL};
    PyObject *instructions;
    Py_ssize_t registers, numbers, inputs, outputs, accumulators = 0, histograms = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "Onnnn|nn:Program", names, &instructions, &registers,
                                     &numbers, &inputs, &outputs, &accumulators, &histograms))
        return NULL;
    struct program program = {0};
    if (count_argument(&program.registers, registers, 65535, "registers") < 0 ||
        count_argument(&program.numbers, numbers, 65536, "numbers") < 0 ||
        count_argument(&program.inputs, inputs, 65536, "inputs") < 0 ||
        count_argument(&program.outputs, outputs, 65536, "outputs") < 0 ||
        count_argument(&program.accumulators, accumulators, 65536, "accumulators") < 0 ||
        count_argument(&program.histograms, histograms, 1024, "histograms") < 0)
        return NULL;
    Py_buffer view;
    if (typed_buffer(&view, instructions, "H", 2, 0, "instructions are numbers of 16 bits without sign") < 0)
        return NULL;
    int copied = program_copy(&program, &view);
    PyBuffer_Release(&view);
    if (copied < 0)
        return NULL;
    char message[200] = "";
    if (program_check(&program, message, sizeof message) < 0) {
        program_clear(&program);
        PyErr_SetString(PyExc_ValueError, message);
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    ProgramObject *self = (ProgramObject *)allocate(type, 0);
    if (!self) {
        program_clear(&program);
        return NULL;
    }
    self->program = program;
    return (PyObject *)self;
}

static void program_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    program_clear(&((ProgramObject *)self)->program);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *program_count(PyObject *self, void *which)
{
    const struct program *program = &((ProgramObject *)self)->program;
    const size_t counts[] = {program->length,  program->registers, program->numbers,      program->inputs,
                             program->outputs, program->loads,     program->accumulators, program->histograms,
                             program->stores,  program->histogram_begins[program->histograms]};
    return PyLong_FromSize_t(counts[(uintptr_t)which]);
}

static PyGetSetDef program_properties[] = {
    {"length", program_count, NULL, "Instructions.", (void *)0},
    {"registers", program_count, NULL, "Registers.", (void *)1},
    {"numbers", program_count, NULL, "Numbers that a call brings.", (void *)2},
    {"inputs", program_count, NULL, "Inputs that a call brings.", (void *)3},
    {"outputs", program_count, NULL, "Outputs that a call brings.", (void *)4},
    {"loads", program_count, NULL, "Instructions that load.", (void *)5},
    {"accumulators", program_count, NULL, "Partial results for each chunk.", (void *)6},
    {"histograms", program_count, NULL, "Histograms.", (void *)7},
    {"counts", program_count, NULL, "Counts of all histograms.", (void *)9},
    {"stores", program_count, NULL, "Instructions that store.", (void *)8},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot program_slots[] = {
    {Py_tp_doc, "A straight line of instructions whose every index and type was checked."},
    {Py_tp_new, program_new},
    {Py_tp_dealloc, program_dealloc},
    {Py_tp_getset, program_properties},
    {0, NULL},
};

PyType_Spec program_spec = {
    "remelt.engine.native._native.Program",
    sizeof(ProgramObject),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    program_slots,
};

/* ---- Report. ---- */

enum { REPORTED = 5 };

static PyStructSequence_Field report_fields[] = {
    {"loads", "The loads, by their order in the program, that met NaN or an infinity in the stored values."},
    {"stores", "The stores, by their order in the program, that stored NaN or an infinity."},
    {"checksums", "What the stored bytes add to their tensor's checksum, for each store; 0 where none was asked for."},
    {"reading", "Nanoseconds that reading files took."},
    {"writing", "Nanoseconds that writing files took."},
    {NULL, NULL},
};

PyStructSequence_Desc report_description = {
    "remelt.engine.native.Report",
    "What a call found.",
    report_fields,
    REPORTED,
};

/* The places that are set, as a tuple: nearly always an empty one. */
static PyObject *places_of(const uint8_t *flags, size_t count)
{
    Py_ssize_t set = 0;
    for (size_t i = 0; i < count; i++)
        set += flags[i] != 0;
    PyObject *found = PyTuple_New(set);
    for (size_t i = 0, next = 0; found && i < count; i++) {
        if (!flags[i])
            continue;
        PyObject *place = PyLong_FromSize_t(i);
        if (!place) {
            Py_DECREF(found);
            return NULL;
        }
        PyTuple_SetItem(found, (Py_ssize_t)next++, place);
    }
    return found;
}

static PyObject *numbers_of(const uint64_t *values, size_t count)
{
    PyObject *found = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; found && i < count; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(values[i]);
        if (!value) {
            Py_DECREF(found);
            return NULL;
        }
        PyTuple_SetItem(found, (Py_ssize_t)i, value);
    }
    return found;
}

PyObject *report_of(PyTypeObject *type, const struct program *program, const struct call *call)
{
    PyObject *report = PyStructSequence_New(type);
    if (!report)
        return NULL;
    PyObject *parts[REPORTED] = {
        places_of(call->loads, program->loads),
        places_of(call->stores, program->stores),
        numbers_of(call->checksums, program->stores),
        PyLong_FromUnsignedLongLong(call->reading),
        PyLong_FromUnsignedLongLong(call->writing),
    };
    int complete = 1;
    for (int i = 0; i < REPORTED; i++) {
        complete &= parts[i] != NULL;
        if (parts[i])
            PyStructSequence_SetItem(report, i, parts[i]);
    }
    if (!complete) {
        Py_DECREF(report);
        return NULL;
    }
    return report;
}
