"""Cleaning operations, one module each. `base` holds their contract."""
