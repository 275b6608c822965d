"""Untrusted input: limits on its memory and size, and its display as text."""
