/* Methods and properties of the core, as Python calls them. A method that takes a request takes its number, and checks
 * where that request is. */
#ifndef BLOCKDEX_CORE_TYPE_H
#define BLOCKDEX_CORE_TYPE_H

#include "core/core.h"

/* settings.c */

PyObject *core_method_set_sequence_columns(struct core *core, PyObject *arguments);
PyObject *core_method_set_epoch(struct core *core, PyObject *epoch);
PyObject *core_method_set_step(struct core *core, PyObject *arguments);
PyObject *core_method_set_replays(struct core *core, PyObject *arguments);
PyObject *core_method_set_run_step(struct core *core, PyObject *run_step);

/* handover.c */

PyObject *core_method_take_set_cells(struct core *core, PyObject *unused);
PyObject *core_method_name_pages(struct core *core, PyObject *arguments);
PyObject *core_method_take_cut(struct core *core, PyObject *unused);
PyObject *core_method_take(struct core *core, PyObject *unused);
PyObject *core_method_grant(struct core *core, PyObject *argument);
PyObject *core_method_begin(struct core *core, PyObject *arguments);
PyObject *core_method_drop_if_gone(struct core *core, PyObject *argument);
PyObject *core_method_answer(struct core *core, PyObject *arguments);
PyObject *core_method_refuse(struct core *core, PyObject *arguments);
PyObject *core_method_abandon(struct core *core, PyObject *arguments);

/* counts.c */

PyObject *core_method_counts(struct core *core, PyObject *unused);
PyObject *core_get_in_flight(struct core *core, void *unused);
PyObject *core_get_launched(struct core *core, void *unused);
PyObject *core_get_time_beside(struct core *core, void *unused);
PyObject *core_get_looked(struct core *core, void *unused);
PyObject *core_get_queued(struct core *core, void *unused);
/* (counts, total). */
PyObject *core_histogram_of(const struct histogram *histogram, uint32_t num_bounds, double unit);
PyObject *core_get_waiting(struct core *core, void *unused);
PyObject *core_get_unanswered(struct core *core, void *unused);
PyObject *core_get_steps(struct core *core, void *unused);
PyObject *core_get_contended(struct core *core, void *unused);
PyObject *core_method_weight(struct core *core, PyObject *tenant);

#endif
