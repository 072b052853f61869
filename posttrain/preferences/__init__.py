"""Preference data: pairs from a model's own answers, and blind sheets that people fill in."""
