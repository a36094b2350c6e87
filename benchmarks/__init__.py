"""Measurements, each run as a module; see docs/benchmarks.md."""
