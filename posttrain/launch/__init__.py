"""Starting programs, following them, and leaving no process behind."""
