"""Mutants: deliberately wrong graphs, masks, prompts and sizes, which the float64 reference must tell from ours.

`python -m tests.mutants` prints the table of all of them.
"""
