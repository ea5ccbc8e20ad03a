"""The HTTP frontend: health, readiness, metrics, info and a live page. Never touches torch."""
