"""The channel between front door and engine."""
