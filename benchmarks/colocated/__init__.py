"""An engine beside its server: what a call, and a step of all layers, take over each way to the server."""
