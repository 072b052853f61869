"""Blind comparison: whose answers to the same prompts are preferred, by people or by a model."""
