"""What the commands of `lfrns` do; lfrns_cli reads and checks their arguments and calls the functions here.

A file per theme: `look` (before anything is changed), `make` (a slim checkpoint), `judge` (one that is there), `ship`.
"""
