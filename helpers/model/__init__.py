"""Lesson 03: the base model, loaded in the right precision, and the memory that it needs.

Imports config, prompts and the run folders.
"""
