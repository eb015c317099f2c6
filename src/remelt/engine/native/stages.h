/* Inputs and outputs that are bytes of files, not memory. */
#ifndef REMELT_STAGES_H
#define REMELT_STAGES_H

#include "language.h"

enum {
    STAGE_BYTES = 1 << 18,  /* written at once, at multiples of it: where the page cache takes them quickest */
    STAGE_ELEMENTS = 1 << 15 /* of an input that are read at once: what they take stays in the second cache */
};

/* A buffer between a file and the blocks. */
struct stage {
    struct part part; /* the file, and the offset of the buffer's begin, or of what is to be read next */
    uint8_t *buffer;
    size_t filled, limit; /* bytes to be written, and how many of them make it worth a call */
};

void stage_begin(struct stage *stage, struct part part, uint8_t *buffer);
int stage_read(struct stage *stage, size_t length, struct call *call);  /* 0 or READING_FAILED */
int stage_write(struct stage *stage, size_t length, struct call *call); /* 0 or WRITING_FAILED */

#endif
