"""Calls that a GPU makes by itself: a link whose requests are written, and whose answers are awaited, by kernels."""
