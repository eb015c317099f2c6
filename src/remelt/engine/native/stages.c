/* Bytes of files on their way: read before blocks need them, written when there are enough for the page cache. */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#endif
#include "stages.h"

#include <errno.h>
#include <string.h>
#if WITH_FILES
#include <time.h>
#include <unistd.h>
#endif

void stage_begin(struct stage *stage, struct part part, uint8_t *buffer)
{
    stage->part = part;
    stage->buffer = buffer;
    stage->filled = 0;
    stage->limit = STAGE_BYTES - (size_t)(part.offset % STAGE_BYTES);
}

#if WITH_FILES
static uint64_t nanoseconds(void)
{
    struct timespec now;
    return clock_gettime(CLOCK_MONOTONIC, &now) == 0 ? (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec : 0;
}

static int is_interrupted(ssize_t result) { return result < 0 && errno == EINTR; }

int stage_read(struct stage *stage, size_t length, struct call *call)
{
    uint64_t begun = nanoseconds();
    size_t done = 0;
    while (done < length) {
        ssize_t found =
            pread(stage->part.descriptor, stage->buffer + done, length - done, (off_t)(stage->part.offset + done));
        if (is_interrupted(found))
            continue;
        if (found <= 0) {
            call->error = found < 0 ? errno : 0;
            return READING_FAILED;
        }
        done += (size_t)found;
    }
    stage->part.offset += length;
    call->reading += nanoseconds() - begun;
    return 0;
}

int stage_write(struct stage *stage, size_t length, struct call *call)
{
    uint64_t begun = nanoseconds();
    size_t done = 0;
    while (done < length) {
        ssize_t found =
            pwrite(stage->part.descriptor, stage->buffer + done, length - done, (off_t)(stage->part.offset + done));
        if (is_interrupted(found))
            continue;
        if (found <= 0) {
            call->error = found < 0 ? errno : ENOSPC;
            return WRITING_FAILED;
        }
        done += (size_t)found;
    }
    stage->part.offset += length;
    stage->filled -= length;
    stage->limit = STAGE_BYTES;
    memmove(stage->buffer, stage->buffer + length, stage->filled);
    call->writing += nanoseconds() - begun;
    return 0;
}
#else
int stage_read(struct stage *stage, size_t length, struct call *call)
{
    (void)stage, (void)length;
    call->error = ENOSYS;
    return READING_FAILED;
}

int stage_write(struct stage *stage, size_t length, struct call *call)
{
    (void)stage, (void)length;
    call->error = ENOSYS;
    return WRITING_FAILED;
}
#endif
