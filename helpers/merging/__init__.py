"""Lesson 05: the adapter merged into the model, the files that llama.cpp reads, publishing.

Imports the rooms data and model, and what lies below them.
"""
