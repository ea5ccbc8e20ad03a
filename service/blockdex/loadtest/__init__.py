"""`blockdex loadtest`: load on a server through the Python client, its answers checked, its latency told.

The way through: `command` reads the arguments, `shapes` fits a scenario to the server, `fleet` starts `worker`
processes whose clients run `scripts` (first against a `null_server`, then against the real one), `recorder` counts,
`checking` holds a sample of answers against the reference, and `result`, `slo`, `comparison` and `report` tell.
"""
