"""Models behind OpenAI's interface, and a page to try them. Imports answers and what is below."""
