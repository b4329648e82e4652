"""Trains what makes the base `smol` see: a projector and one adapter, in stages like LLaVA's, on one processor core.

`python -m studies.smol` runs what is not there yet and goes on where it was cut off. NOTES.md tells what was tried.
"""
