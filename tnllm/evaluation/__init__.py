"""Evaluation: log-probabilities with shared prefixes, lm-evaluation-harness tasks online and offline, perplexity."""
