"""Lesson 02: from posts to rows that a model can learn from.

Where rows come from and their formats, HTML to Markdown, the rules, duplicates, contamination,
the split and the card. Imports config, prompts and the run folders.
"""
