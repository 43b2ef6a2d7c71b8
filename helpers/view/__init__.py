"""What a reader looks at: figures, widgets, the live chart, and text that is safe to show.

Imports config and prompts only.
"""
