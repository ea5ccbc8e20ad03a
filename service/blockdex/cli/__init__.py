"""The commands of `blockdex`."""
