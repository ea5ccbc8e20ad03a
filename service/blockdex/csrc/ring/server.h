/* One link, as the engine's thread sees it: requests come off it, answers go onto it. */
#ifndef BLOCKDEX_LINE_H
#define BLOCKDEX_LINE_H

#include "native.h"

#include "blockdex_ring.h"

#include <stdbool.h>

/* An answer for which there was no room. */
struct unwritten {
    struct unwritten *next;
    struct blockdex_answer numbers;
    char payload[];
};

struct line {
    PyObject_HEAD
    Py_buffer memory;
    struct blockdex_header *header;
    char *requests, *answers, *request_arena, *answer_arena;
    uint64_t request_slots, answer_slots, request_arena_bytes, answer_arena_bytes;
    uint64_t read, written, tape_end;
    struct unwritten *first_unwritten, **last_unwritten;
    int bell, own_bell;
    bool gone;    /* nobody is there to be answered */
    bool waits;   /* the oldest request is one for Python */
    bool changed; /* answers were written and not yet shown */
    bool crowded; /* Python has answers for which there was no room */
};

/* A place for an answer. */
struct place {
    struct blockdex_answer *slot;
    char *payload;
    uint64_t offset, end;
};

extern PyType_Spec blockdex_line_spec;

/* Whether an object is a line. */
bool line_is_one(PyObject *object);

/* Requests that are there, as far as that can be; -1 where the frontend says what cannot be. */
int64_t line_filled(const struct line *line);

/* Bytes of an answer that there is room for at some time. */
uint64_t line_longest(const struct line *line);

/* The oldest request, of which there is one. It stays as it is until line_release. */
const struct blockdex_request *line_head(const struct line *line);
void line_release(struct line *line);

/* Answers, as soon as there is room: numbers, but for the place of what they carry. False: no memory is left. */
bool line_answer(struct line *line, struct blockdex_answer numbers, const void *payload, uint64_t bytes);

/* Writes answers that there was no room for; shows the frontend what was written, and wakes it. */
void line_publish(struct line *line);

/* Whether it gets answers: who does not read them gets no more, and so is asked nothing until there is room. */
bool line_is_heard(const struct line *line);

/* Whether the oldest request is one for Python to take now. */
bool line_is_for_python(const struct line *line);

/* Whether the frontend says that Python may try again to write its answers. */
bool line_has_room_again(const struct line *line);

/* Says that the engine sleeps from now on, or is awake; who lies down looks once more before it sleeps. */
void line_lie_down(struct line *line);
void line_get_up(struct line *line);

#endif
