"""Sweeps: a recipe run with several values of its keys, and which of them to take.

`space` says which values, `plan` which stages they reach, `study` what is tried next and given up,
`run` runs the trials, `choice` picks one, `record` and `page` keep and show it.
"""
