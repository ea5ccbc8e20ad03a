"""The processes of a server: a supervisor with the HTTP side, an engine core, and frontends; or one for all of it."""
