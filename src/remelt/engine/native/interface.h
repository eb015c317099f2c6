/* What the parts that Python sees say to each other. Include it first. */
#ifndef REMELT_INTERFACE_H
#define REMELT_INTERFACE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "language.h"

typedef struct {
    PyTypeObject *program_type;
    PyTypeObject *report_type;
} State;

typedef struct {
    PyObject_HEAD
    struct program program;
} ProgramObject;

/* Memory that a caller brings: a buffer, an address and its length, or bytes of an open file. */
typedef struct {
    Py_buffer view;
    int is_view;
    uint8_t *address;
    size_t length;
    struct part part;
} Memory;

/* module.c: what the machine has, or a lower choice of tests. A pointer is read whole, so calls may run while it is
 * set. */
extern const struct capability *active;

/* memory.c */
int memory_from_object(Memory *memory, PyObject *object, int writable);
void memory_release(Memory *memory);
int typed_buffer(Py_buffer *view, PyObject *object, const char *letters, Py_ssize_t size, int writable,
                 const char *what); /* a contiguous buffer whose elements are of one of the letters, with that size */

/* objects.c */
extern PyType_Spec program_spec;
extern PyStructSequence_Desc report_description;
PyObject *report_of(PyTypeObject *type, const struct program *program, const struct call *call);

/* calls.c */
PyObject *native_run(PyObject *module, PyObject *const *values, Py_ssize_t count, PyObject *names);
PyObject *native_inspect(PyObject *module, PyObject *const *values, Py_ssize_t count);

#endif
