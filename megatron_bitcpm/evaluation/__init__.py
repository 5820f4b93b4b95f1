"""Comparison, metrics and benchmarks."""
