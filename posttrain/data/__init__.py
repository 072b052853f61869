"""What prepare is made of: sources, formats, deduplication, splits."""
