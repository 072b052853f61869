"""posttrain: from a base LLM and raw data to a fine-tuned model that is safe to ship."""

__version__ = "0.1.0"
