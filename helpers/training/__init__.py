"""Lesson 04: what the trainer is given beside the library's own arguments.

Its rows, callbacks, checkpoints and resume; `fast` holds the recorded step, its kernels and the
CPU's loss. Imports the rooms data and model, and what lies below them.
"""
