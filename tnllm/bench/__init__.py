"""Benchmarks that pass a correctness gate before they time anything."""
