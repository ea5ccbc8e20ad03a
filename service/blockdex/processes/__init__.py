"""The processes of a server: a supervisor with the HTTP side, an engine core, and front doors; or one for all of it."""
