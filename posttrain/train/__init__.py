"""What the training stages are made of: models, adapters, collation, callbacks."""
