"""Lightning attention: causal linear attention with a fixed exponential decay per head."""
