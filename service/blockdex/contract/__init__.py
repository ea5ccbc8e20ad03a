"""The words of the service: messages, errors, limits. Imports nothing of it."""
