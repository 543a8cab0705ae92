"""A whole decoding step as one persistent Triton kernel: `wide` for large models, `narrow` for small ones."""
