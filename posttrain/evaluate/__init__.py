"""What evaluation is made of: lm-eval, perplexity, samples, the statistics of the gate."""
