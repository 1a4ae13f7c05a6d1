"""Attempts to break the library and the example on purpose: one file a kind, one function an attempt.

    python -m benchmarks.attempts                  run all on the working tree
    python -m benchmarks.attempts --old COMMIT     run all on that commit too, and write the record
    python -m benchmarks.attempts --kind teacher   run one file; with --old, write a record of it alone

An attempt says what is right, does something unusual, and returns what it saw (see :mod:`benchmarks.attempts.attempt`).
Each runs in a process of its own. ``tests/benchmarks/test_attempts.py`` runs all of them and expects all to survive.
"""
