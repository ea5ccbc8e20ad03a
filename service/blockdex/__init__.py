"""Block selection for block-sparse attention, served from a sidecar."""
