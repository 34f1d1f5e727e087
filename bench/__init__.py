"""Measurements, each a command of its own: CONTRIBUTING.md lists them, README.md here what they found."""
