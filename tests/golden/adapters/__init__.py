"""One module per method: how a case of its vectors is run through this project, and mutants that must be noticed.

A module has `check(case, arrays, folder)`, which raises AssertionError where a result differs, and `MUTANTS`, names of
deliberate mistakes with a function that makes them through pytest's monkeypatch.
"""
