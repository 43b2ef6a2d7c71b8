"""Lesson 06: answers of base and tuned model, the problems, and the scores.

Generated code runs in a sandbox. Imports training, merging, and what lies below them.
"""
