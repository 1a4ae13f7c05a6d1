"""Benchmarks, one question a file, and the records of all that was measured."""
