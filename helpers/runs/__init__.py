"""Runs of the notebooks: their folders with locks and hashes, the runner, report and recording.

The folders lie at the bottom and import config only; runner and report lie at the top.
"""
