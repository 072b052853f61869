"""One program a stage, each run as `python -m posttrain.stages.<stage> STAGE_DIR`."""
