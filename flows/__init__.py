"""Prefect flows: the sequence of stages and nothing else."""
