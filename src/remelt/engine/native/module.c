/* What Python sees: checked programs, calls with every length checked, and what they found. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "language.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    PyTypeObject *program_type;
    PyTypeObject *report_type;
} State;

typedef struct {
    PyObject_HEAD
    struct program program;
} ProgramObject;

/* What the machine has, or a lower choice of tests. A pointer is read whole, so calls may run while it is set. */
static const struct capability *active;

/* ---- Buffers. ---- */

/* Memory that a caller brings: a buffer, or an address and its length. */
typedef struct {
    Py_buffer view;
    int is_view;
    uint8_t *address;
    size_t length;
} Memory;

static void memory_release(Memory *memory)
{
    if (memory->is_view)
        PyBuffer_Release(&memory->view);
    memory->is_view = 0;
}

static int memory_from_pair(Memory *memory, PyObject *pair)
{
    if (PyTuple_Size(pair) != 2) {
        PyErr_SetString(PyExc_ValueError, "memory is a buffer or a pair of address and length");
        return -1;
    }
    size_t address = PyLong_AsSize_t(PyTuple_GetItem(pair, 0));
    if (address == (size_t)-1 && PyErr_Occurred())
        return -1;
    size_t length = PyLong_AsSize_t(PyTuple_GetItem(pair, 1));
    if (length == (size_t)-1 && PyErr_Occurred())
        return -1;
    if (length > 0 && (address == 0 || address + length < address)) {
        PyErr_SetString(PyExc_ValueError, "memory lies at an address that is not 0, and ends before the last");
        return -1;
    }
    memory->address = (uint8_t *)(uintptr_t)address;
    memory->length = length;
    return 0;
}

static int memory_from_object(Memory *memory, PyObject *object, int writable)
{
    memory->is_view = 0;
    if (PyTuple_Check(object))
        return memory_from_pair(memory, object);
    if (PyObject_GetBuffer(object, &memory->view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return -1;
    memory->is_view = 1;
    memory->address = memory->view.buf;
    memory->length = (size_t)memory->view.len;
    return 0;
}

/* The single letter of a buffer's format, or 0. */
static char letter_of(const Py_buffer *view)
{
    const char *format = view->format ? view->format : "B";
    if (*format == '<' || *format == '=' || *format == '@')
        format++;
    return format[0] != 0 && format[1] == 0 ? format[0] : 0;
}

/* A contiguous buffer whose elements are of one of the letters, with that size. */
static int typed_buffer(Py_buffer *view, PyObject *object, const char *letters, Py_ssize_t size, int writable,
                        const char *what)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    char letter = letter_of(view);
    if (letter == 0 || strchr(letters, letter) == NULL || view->itemsize != size) {
        PyErr_Format(PyExc_ValueError, "%s, but got elements of format '%s'", what, view->format ? view->format : "B");
        PyBuffer_Release(view);
        return -1;
    }
    if ((uintptr_t)view->buf % (uintptr_t)size && view->len > 0) {
        PyErr_Format(PyExc_ValueError, "%s, at an address that is a multiple of %zd", what, size);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

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
                             program->stores};
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

static PyType_Spec program_spec = {
    "remelt.engine.native._native.Program",
    sizeof(ProgramObject),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    program_slots,
};

/* ---- Report. ---- */

static PyStructSequence_Field report_fields[] = {
    {"loads", "The loads, by their order in the program, that met NaN or an infinity in the stored values."},
    {"stores", "The stores, by their order in the program, that stored NaN or an infinity."},
    {"checksums", "What the stored bytes add to their tensor's checksum, for each store; 0 where none was asked for."},
    {NULL, NULL},
};

static PyStructSequence_Desc report_description = {
    "remelt.engine.native.Report",
    "What a call found.",
    report_fields,
    3,
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

static PyObject *report_of(PyTypeObject *type, const struct program *program, const struct call *call)
{
    PyObject *report = PyStructSequence_New(type);
    if (!report)
        return NULL;
    PyObject *parts[3] = {places_of(call->loads, program->loads), places_of(call->stores, program->stores),
                          numbers_of(call->checksums, program->stores)};
    int complete = 1;
    for (int i = 0; i < 3; i++) {
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

/* ---- run ---- */

/* All that a call holds while it runs. */
typedef struct {
    const struct program *program;
    struct call call;
    Memory *memories; /* inputs, then outputs */
    size_t held;
    Py_buffer numbers, sums, histograms;
    int has_numbers, has_sums, has_histograms;
    double *copied_numbers;
    void *block;
} Call;

static void call_release(Call *it)
{
    for (size_t i = 0; i < it->held; i++)
        memory_release(&it->memories[i]);
    if (it->has_numbers)
        PyBuffer_Release(&it->numbers);
    if (it->has_sums)
        PyBuffer_Release(&it->sums);
    if (it->has_histograms)
        PyBuffer_Release(&it->histograms);
    free(it->block);
}

/* One piece of memory for everything whose size the program says. */
static int call_allocate(Call *it)
{
    const struct program *program = it->program;
    size_t memories = program->inputs + program->outputs;
    size_t size = memories * sizeof(Memory) + program->stores * sizeof(uint64_t) + program->numbers * sizeof(double) +
                  memories * sizeof(uint8_t *) + program->loads + program->stores;
    uint8_t *place = it->block = calloc(1, size + 1);
    if (!place) {
        PyErr_NoMemory();
        return -1;
    }
    it->memories = (Memory *)place;
    place += memories * sizeof(Memory);
    it->call.checksums = (uint64_t *)place;
    place += program->stores * sizeof(uint64_t);
    it->copied_numbers = (double *)place;
    place += program->numbers * sizeof(double);
    it->call.inputs = (const uint8_t *const *)place;
    it->call.outputs = (uint8_t *const *)(place + program->inputs * sizeof(uint8_t *));
    place += memories * sizeof(uint8_t *);
    it->call.loads = place;
    it->call.stores = place + program->loads;
    return 0;
}

static int numbers_from_items(Call *it, PyObject *given, Py_ssize_t count, int is_list)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        /* Own reference: a number's __float__ may change the list. */
        PyObject *item = is_list ? PyList_GetItem(given, i) : PyTuple_GetItem(given, i);
        if (!item)
            return -1;
        Py_INCREF(item);
        double value = PyFloat_AsDouble(item);
        Py_DECREF(item);
        if (value == -1.0 && PyErr_Occurred())
            return -1;
        it->copied_numbers[i] = value;
    }
    it->call.numbers = it->copied_numbers;
    return 0;
}

static int take_numbers(Call *it, PyObject *given)
{
    size_t wanted = it->program->numbers, found;
    int is_list = PyList_Check(given);
    if (is_list || PyTuple_Check(given)) {
        found = (size_t)(is_list ? PyList_Size(given) : PyTuple_Size(given));
    } else {
        if (typed_buffer(&it->numbers, given, "d", 8, 0, "numbers are float64") < 0)
            return -1;
        it->has_numbers = 1;
        found = (size_t)it->numbers.len / 8;
        it->call.numbers = it->numbers.buf;
    }
    if (found != wanted) {
        PyErr_Format(PyExc_ValueError, "the program takes %zu numbers, but got %zu", wanted, found);
        return -1;
    }
    return it->has_numbers ? 0 : numbers_from_items(it, given, (Py_ssize_t)found, is_list);
}

/* The inputs or outputs: as many as the program has, each long enough for the elements. */
static int take_memories(Call *it, PyObject *given, int writable)
{
    const struct program *program = it->program;
    const char *what = writable ? "outputs" : "inputs";
    size_t count = writable ? program->outputs : program->inputs;
    const size_t *sizes = writable ? program->output_sizes : program->input_sizes;
    uint8_t **addresses = writable ? (uint8_t **)it->call.outputs : (uint8_t **)it->call.inputs;
    int is_list = PyList_Check(given);
    if (!is_list && !PyTuple_Check(given)) {
        PyErr_Format(PyExc_TypeError, "%s are a list or a tuple", what);
        return -1;
    }
    Py_ssize_t found = is_list ? PyList_Size(given) : PyTuple_Size(given);
    if ((size_t)found != count) {
        PyErr_Format(PyExc_ValueError, "the program takes %zu %s, but got %zd", count, what, found);
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        Memory *memory = &it->memories[it->held];
        PyObject *item = is_list ? PyList_GetItem(given, (Py_ssize_t)i) : PyTuple_GetItem(given, (Py_ssize_t)i);
        if (!item || memory_from_object(memory, item, writable) < 0)
            return -1;
        it->held++;
        if (sizes[i] && memory->length / sizes[i] < it->call.count) {
            PyErr_Format(PyExc_ValueError,
                         "%zu elements of %zu bytes are more than the %zu bytes of number %zu of the %s",
                         it->call.count, sizes[i], memory->length, i, what);
            return -1;
        }
        addresses[i] = memory->address;
    }
    return 0;
}

static int take_results(Call *it, PyObject *sums, PyObject *histograms)
{
    const struct program *program = it->program;
    size_t chunks = it->call.count / CHUNK + (it->call.count % CHUNK != 0);
    if ((program->accumulators != 0) != (sums != Py_None) || (program->histograms != 0) != (histograms != Py_None)) {
        PyErr_SetString(PyExc_ValueError, "sums and histograms are given where the program has such, and only there");
        return -1;
    }
    if (sums != Py_None) {
        if (typed_buffer(&it->sums, sums, "d", 8, 1, "sums are float64") < 0)
            return -1;
        it->has_sums = 1;
        it->call.sums = it->sums.buf;
        if (it->call.start % CHUNK) {
            PyErr_Format(PyExc_ValueError, "a call with sums begins at a multiple of %d, but got %zu", CHUNK,
                         it->call.start);
            return -1;
        }
        if ((size_t)it->sums.len / 8 / program->accumulators < chunks) {
            PyErr_Format(PyExc_ValueError, "%zu chunks of %zu sums are more than %zd numbers", chunks,
                         program->accumulators, it->sums.len / 8);
            return -1;
        }
    }
    if (histograms != Py_None) {
        if (typed_buffer(&it->histograms, histograms, "qlQL", 8, 1, "histograms are int64") < 0)
            return -1;
        it->has_histograms = 1;
        it->call.histograms = it->histograms.buf;
        if ((size_t)it->histograms.len / 8 / BINS < program->histograms) {
            PyErr_Format(PyExc_ValueError, "%zu histograms of %d bins are more than %zd numbers", program->histograms,
                         BINS, it->histograms.len / 8);
            return -1;
        }
    }
    if (program->with_checksums && it->call.start % program->checksum_step) {
        PyErr_Format(PyExc_ValueError, "a call with checksums begins at a multiple of %zu elements, but got %zu",
                     program->checksum_step, it->call.start);
        return -1;
    }
    return 0;
}

/* Runs without Python's lock, unless that would cost more than the call. */
static int call_run(Call *it)
{
    const struct capability *capability = active;
    int result;
    if (it->call.count / 8 * it->program->length < 2 * BLOCK) {
        result = run_program(it->program, &it->call, capability);
    } else {
        Py_BEGIN_ALLOW_THREADS
        result = run_program(it->program, &it->call, capability);
        Py_END_ALLOW_THREADS
    }
    if (result < 0)
        PyErr_NoMemory();
    return result;
}

static int run_keywords(PyObject *const *values, PyObject *names, size_t *start, PyObject **sums,
                        PyObject **histogram)
{
    Py_ssize_t count = names ? PyTuple_Size(names) : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "start") == 0) {
            *start = PyLong_AsSize_t(values[i]);
            if (*start == (size_t)-1 && PyErr_Occurred())
                return -1;
        } else if (PyUnicode_CompareWithASCIIString(name, "sums") == 0) {
            *sums = values[i];
        } else if (PyUnicode_CompareWithASCIIString(name, "histogram") == 0) {
            *histogram = values[i];
        } else {
            PyErr_Format(PyExc_TypeError, "run() has no argument %R", name);
            return -1;
        }
    }
    return 0;
}

static PyObject *native_run(PyObject *module, PyObject *const *values, Py_ssize_t count, PyObject *names)
{
    State *state = PyModule_GetState(module);
    PyObject *sums = Py_None, *histogram = Py_None, *report = NULL;
    Call it;
    memset(&it, 0, sizeof it);
    if (count != 5) {
        PyErr_Format(PyExc_TypeError, "run() takes program, numbers, inputs, outputs and count, but got %zd", count);
        return NULL;
    }
    if (Py_TYPE(values[0]) != state->program_type) {
        PyErr_SetString(PyExc_TypeError, "run() takes a Program first");
        return NULL;
    }
    it.program = &((ProgramObject *)values[0])->program;
    it.call.count = PyLong_AsSize_t(values[4]);
    if (it.call.count == (size_t)-1 && PyErr_Occurred())
        return NULL;
    if (run_keywords(values + count, names, &it.call.start, &sums, &histogram) < 0)
        return NULL;
    if (it.call.count > PY_SSIZE_T_MAX / 8 || it.call.start > PY_SSIZE_T_MAX / 8 - it.call.count) {
        PyErr_SetString(PyExc_ValueError, "count and start are those of a tensor that fits the address space");
        return NULL;
    }
    if (call_allocate(&it) == 0 && take_numbers(&it, values[1]) == 0 && take_memories(&it, values[2], 0) == 0 &&
        take_memories(&it, values[3], 1) == 0 && take_results(&it, sums, histogram) == 0 && call_run(&it) == 0)
        report = report_of(state->report_type, it.program, &it.call);
    call_release(&it);
    return report;
}

/* ---- inspect ---- */

/* Both answers of a piece while it is in the cache. */
static void inspect_bytes(const Memory *memory, unsigned type, uint64_t word, int *finite, uint64_t *checksum)
{
    const struct capability *capability = active;
    const size_t piece = 8 * BLOCK;
    for (size_t done = 0; done < memory->length; done += piece) {
        size_t length = memory->length - done < piece ? memory->length - done : piece;
        if (type < STORED_TYPES)
            *finite &= capability->finite[type](memory->address + done, length / stored_sizes[type]);
        *checksum += checksum_bytes(memory->address + done, length, word + done / 8, capability);
    }
}

static PyObject *native_inspect(PyObject *module, PyObject *const *values, Py_ssize_t count)
{
    (void)module;
    if (count != 2 && count != 3) {
        PyErr_Format(PyExc_TypeError, "inspect() takes data, type and start, but got %zd", count);
        return NULL;
    }
    size_t type = PyLong_AsSize_t(values[1]);
    if (type == (size_t)-1 && PyErr_Occurred())
        return NULL;
    size_t start = count == 3 ? PyLong_AsSize_t(values[2]) : 0;
    if (start == (size_t)-1 && PyErr_Occurred())
        return NULL;
    if (type > OPAQUE) {
        PyErr_Format(PyExc_ValueError, "types are 0 to %d, but got %zu", OPAQUE, type);
        return NULL;
    }
    if (start % 8) {
        PyErr_Format(PyExc_ValueError, "a part begins at a multiple of 8, but got %zu", start);
        return NULL;
    }
    Memory memory;
    if (memory_from_object(&memory, values[0], 0) < 0)
        return NULL;
    if (type < STORED_TYPES && memory.length % stored_sizes[type]) {
        PyErr_Format(PyExc_ValueError, "elements of %zu bytes do not fill %zu bytes", stored_sizes[type],
                     memory.length);
        memory_release(&memory);
        return NULL;
    }
    int finite = 1;
    uint64_t checksum = 0;
    if (memory.length < 8 * BLOCK) {
        inspect_bytes(&memory, (unsigned)type, start / 8, &finite, &checksum);
    } else {
        Py_BEGIN_ALLOW_THREADS
        inspect_bytes(&memory, (unsigned)type, start / 8, &finite, &checksum);
        Py_END_ALLOW_THREADS
    }
    memory_release(&memory);
    return Py_BuildValue("(NK)", PyBool_FromLong(finite), (unsigned long long)checksum);
}

/* ---- The module. ---- */

static PyObject *native_capability(PyObject *module, PyObject *nothing)
{
    (void)module;
    (void)nothing;
    return PyUnicode_FromString(active->name);
}

static PyObject *native_capabilities(PyObject *module, PyObject *nothing)
{
    (void)module;
    (void)nothing;
    PyObject *found = PyList_New(0);
    const struct capability *each;
    for (int place = 0; found && (each = capability_at(place)) != NULL; place++) {
        PyObject *name = PyUnicode_FromString(each->name);
        if (!name || PyList_Append(found, name) < 0)
            Py_CLEAR(found);
        Py_XDECREF(name);
    }
    if (!found)
        return NULL;
    PyObject *names = PyList_AsTuple(found);
    Py_DECREF(found);
    return names;
}

static PyObject *native_use(PyObject *module, PyObject *name)
{
    (void)module;
    if (!PyUnicode_Check(name)) {
        PyErr_SetString(PyExc_TypeError, "a capability is named by a string");
        return NULL;
    }
    const struct capability *each;
    for (int place = 0; (each = capability_at(place)) != NULL; place++)
        if (PyUnicode_CompareWithASCIIString(name, each->name) == 0) {
            active = each;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "this machine has no capability %R", name);
    return NULL;
}

static PyObject *native_set_places(PyObject *module, PyObject *places)
{
    (void)module;
    Py_buffer view;
    if (PyObject_GetBuffer(places, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (view.len != (Py_ssize_t)sizeof checksum_places) {
        PyErr_Format(PyExc_ValueError, "the table of places has %zu bytes, but got %zd", sizeof checksum_places,
                     view.len);
        PyBuffer_Release(&view);
        return NULL;
    }
    memcpy(checksum_places, view.buf, sizeof checksum_places);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyMethodDef native_methods[] = {
    {"run", (PyCFunction)(void (*)(void))native_run, METH_FASTCALL | METH_KEYWORDS,
     "run(program, numbers, inputs, outputs, count, *, start=0, sums=None, histogram=None)\n--\n\n"
     "Run a program over elements; what it found."},
    {"inspect", (PyCFunction)(void (*)(void))native_inspect, METH_FASTCALL,
     "inspect(data, type, start=0, /)\n--\n\nWhether all values are finite, and what the bytes add to a checksum."},
    {"capability", native_capability, METH_NOARGS, "capability()\n--\n\nWhat runs: avx512, avx2 or plain."},
    {"capabilities", native_capabilities, METH_NOARGS, "capabilities()\n--\n\nWhat this machine has, the best first."},
    {"use", native_use, METH_O, "use(name, /)\n--\n\nRun with another capability of this machine."},
    {"set_places", native_set_places, METH_O, "set_places(table, /)\n--\n\nTake the checksum's numbers of places."},
    {NULL, NULL, 0, NULL},
};

static int add_mapping(PyObject *module, const char *name, const char *const *keys, int count)
{
    PyObject *mapping = PyDict_New();
    for (int i = 0; mapping && i < count; i++) {
        PyObject *value = PyLong_FromLong(i);
        if (!value || PyDict_SetItemString(mapping, keys[i], value) < 0)
            Py_CLEAR(mapping);
        Py_XDECREF(value);
    }
    if (!mapping)
        return -1;
    int result = PyModule_AddObjectRef(module, name, mapping);
    Py_DECREF(mapping);
    return result;
}

static int native_exec(PyObject *module)
{
    static const char *const types[] = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "OPAQUE"};
    State *state = PyModule_GetState(module);
    if (!active)
        active = capability_at(0);
    state->program_type = (PyTypeObject *)PyType_FromSpec(&program_spec);
    if (!state->program_type || PyModule_AddObjectRef(module, "Program", (PyObject *)state->program_type) < 0)
        return -1;
    state->report_type = PyStructSequence_NewType(&report_description);
    if (!state->report_type || PyModule_AddObjectRef(module, "Report", (PyObject *)state->report_type) < 0)
        return -1;
    if (add_mapping(module, "OPERATIONS", operation_names, OPERATION_COUNT) < 0 ||
        add_mapping(module, "TYPES", types, OPAQUE + 1) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "BLOCK", BLOCK) || PyModule_AddIntConstant(module, "CHUNK", CHUNK) ||
                   PyModule_AddIntConstant(module, "BINS", BINS)
               ? -1
               : 0;
}

static int native_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->program_type);
    Py_VISIT(state->report_type);
    return 0;
}

static int native_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->program_type);
    Py_CLEAR(state->report_type);
    return 0;
}

static void native_free(void *module) { native_clear((PyObject *)module); }

static PyModuleDef_Slot native_slots[] = {
    {Py_mod_exec, native_exec},
    {0, NULL},
};

static struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT, "_native", "The native executor.", sizeof(State), native_methods, native_slots,
    native_traverse,       native_clear, native_free,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&native_module); }
