"""The compiled part: see `native/`."""
