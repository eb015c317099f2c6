/* Calls from Python: every length is checked before anything runs. */
#include "interface.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- run ---- */

/* All that a call holds while it runs. */
typedef struct {
    const struct program *program;
    struct call call;
    Memory *memories; /* inputs, then outputs */
    size_t held;
    Py_buffer numbers, sums, counts;
    int has_numbers, has_sums, has_counts;
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
    if (it->has_counts)
        PyBuffer_Release(&it->counts);
    free(it->block);
}

/* One piece of memory for everything whose size the program says. */
static int call_allocate(Call *it)
{
    const struct program *program = it->program;
    size_t memories = program->inputs + program->outputs;
    size_t size = memories * sizeof(Memory) + program->stores * sizeof(uint64_t) + program->numbers * sizeof(double) +
                  memories * (sizeof(uint8_t *) + sizeof(struct part)) + program->loads + program->stores;
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
    it->call.input_parts = (const struct part *)place;
    it->call.output_parts = (const struct part *)place + program->inputs;
    place += memories * sizeof(struct part);
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
    struct part *parts = (struct part *)(writable ? it->call.output_parts : it->call.input_parts);
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
        parts[i] = memory->part;
    }
    return 0;
}

static int take_results(Call *it, PyObject *sums, PyObject *counts)
{
    const struct program *program = it->program;
    size_t chunks = it->call.count / CHUNK + (it->call.count % CHUNK != 0);
    if ((program->accumulators != 0) != (sums != Py_None) || (program->histograms != 0) != (counts != Py_None)) {
        PyErr_SetString(PyExc_ValueError, "sums and counts are given where the program has such, and only there");
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
    if (counts != Py_None) {
        size_t needed = program->histogram_begins[program->histograms];
        if (typed_buffer(&it->counts, counts, "iIlL", 4, 1, "counts are int32") < 0)
            return -1;
        it->has_counts = 1;
        it->call.counts = it->counts.buf;
        if ((size_t)it->counts.len / 4 < needed) {
            PyErr_Format(PyExc_ValueError, "the histograms have %zu counts, but there is room for %zd", needed,
                         it->counts.len / 4);
            return -1;
        }
        if (it->call.count > INT32_MAX) {
            PyErr_Format(PyExc_ValueError, "a call counts at most %d elements, but got %zu", INT32_MAX, it->call.count);
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
    if (result == NO_MEMORY) {
        PyErr_NoMemory();
    } else if (result == READING_FAILED && it->call.error == 0) {
        PyErr_SetString(PyExc_EOFError, "an input file ends before its last element");
    } else if (result < 0) {
        errno = it->call.error;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, result == READING_FAILED ? "input" : "output");
    }
    return result;
}

static int run_keywords(PyObject *const *values, PyObject *names, size_t *start, PyObject **sums,
                        PyObject **counts)
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
        } else if (PyUnicode_CompareWithASCIIString(name, "counts") == 0) {
            *counts = values[i];
        } else {
            PyErr_Format(PyExc_TypeError, "run() has no argument %R", name);
            return -1;
        }
    }
    return 0;
}

PyObject *native_run(PyObject *module, PyObject *const *values, Py_ssize_t count, PyObject *names)
{
    State *state = PyModule_GetState(module);
    PyObject *sums = Py_None, *counts = Py_None, *report = NULL;
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
    if (run_keywords(values + count, names, &it.call.start, &sums, &counts) < 0)
        return NULL;
    if (it.call.count > PY_SSIZE_T_MAX / 8 || it.call.start > PY_SSIZE_T_MAX / 8 - it.call.count) {
        PyErr_SetString(PyExc_ValueError, "count and start are those of a tensor that fits the address space");
        return NULL;
    }
    if (call_allocate(&it) == 0 && take_numbers(&it, values[1]) == 0 && take_memories(&it, values[2], 0) == 0 &&
        take_memories(&it, values[3], 1) == 0 && take_results(&it, sums, counts) == 0 && call_run(&it) == 0)
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

PyObject *native_inspect(PyObject *module, PyObject *const *values, Py_ssize_t count)
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
    if (memory.part.descriptor != NO_FILE) {
        PyErr_SetString(PyExc_ValueError, "inspect() takes memory, not a file");
        return NULL;
    }
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
