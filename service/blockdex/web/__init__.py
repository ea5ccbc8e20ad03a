"""The HTTP front door: health, readiness, metrics and info. Never touches torch."""
