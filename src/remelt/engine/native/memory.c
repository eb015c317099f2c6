/* The memory and the files that callers bring, with their lengths. */
#include "interface.h"

#include <limits.h>
#include <string.h>

void memory_release(Memory *memory)
{
    if (memory->is_view)
        PyBuffer_Release(&memory->view);
    memory->is_view = 0;
}

/* A number of a tuple, of at most as many bits as a size. */
static int size_at(size_t *found, PyObject *tuple, Py_ssize_t place)
{
    *found = PyLong_AsSize_t(PyTuple_GetItem(tuple, place));
    return *found == (size_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int memory_from_pair(Memory *memory, PyObject *pair)
{
    size_t address;
    if (size_at(&address, pair, 0) < 0 || size_at(&memory->length, pair, 1) < 0)
        return -1;
    if (memory->length > 0 && (address == 0 || address + memory->length < address)) {
        PyErr_SetString(PyExc_ValueError, "memory lies at an address that is not 0, and ends before the last");
        return -1;
    }
    memory->address = (uint8_t *)(uintptr_t)address;
    return 0;
}

static int memory_from_file(Memory *memory, PyObject *three)
{
    size_t descriptor, offset;
    if (size_at(&descriptor, three, 0) < 0 || size_at(&offset, three, 1) < 0 || size_at(&memory->length, three, 2) < 0)
        return -1;
    if (!WITH_FILES || descriptor > INT_MAX || offset > PY_SSIZE_T_MAX - (memory->length & PY_SSIZE_T_MAX) ||
        memory->length > PY_SSIZE_T_MAX) {
        PyErr_SetString(PyExc_ValueError, "a file's bytes lie in an open file, and end where a file can");
        return -1;
    }
    memory->part.descriptor = (int)descriptor;
    memory->part.offset = offset;
    return 0;
}

int memory_from_object(Memory *memory, PyObject *object, int writable)
{
    memory->is_view = 0;
    memory->address = NULL;
    memory->part.descriptor = NO_FILE;
    if (PyTuple_Check(object) && PyTuple_Size(object) == 2)
        return memory_from_pair(memory, object);
    if (PyTuple_Check(object) && PyTuple_Size(object) == 3)
        return memory_from_file(memory, object);
    if (PyTuple_Check(object)) {
        PyErr_SetString(PyExc_ValueError, "memory is a buffer, a pair of address and length, or a file's descriptor, "
                                          "offset and length");
        return -1;
    }
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

int typed_buffer(Py_buffer *view, PyObject *object, const char *letters, Py_ssize_t size, int writable,
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
