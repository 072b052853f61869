"""Prefect tasks, one file a stage: inputs in, artifact out."""
