/* The module: its functions, and the tables of names. */
#include "interface.h"

#include <string.h>

const struct capability *active;

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
     "run(program, numbers, inputs, outputs, count, *, start=0, sums=None, counts=None)\n--\n\n"
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
    if (PyModule_AddObjectRef(module, "FILES", WITH_FILES ? Py_True : Py_False) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "BLOCK", BLOCK) || PyModule_AddIntConstant(module, "CHUNK", CHUNK) ||
                   PyModule_AddIntConstant(module, "ROW", ROW)
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
