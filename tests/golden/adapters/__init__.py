"""One module per method: how a case of its vectors is run through this project, and mutants that must be noticed.

A module has `check(case, arrays, folder)`, which raises AssertionError where a result differs, and `MUTANTS`, names of
deliberate mistakes with a function that makes them through pytest's monkeypatch. `COVERS` names the methods that its
cases check, where that is not the module's name alone.
"""
