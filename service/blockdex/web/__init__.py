"""The HTTP front door: health, readiness, metrics, info and a live page. Never touches torch."""
