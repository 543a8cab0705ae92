"""Lightning Attention: causal linear attention with one constant decay per head."""
