"""Small faults put into the C, one at a time, each of which some test must see: `python -m mutants` in `tests`."""
