"""After a gate that said no: what went wrong, what would help, and the recipe that does it.

`symptoms` reads a verdict, `propose` turns it into remedies, `text` writes them into the user's
YAML, `session` looks everything up in the store. Nothing here imports a training library.
"""
