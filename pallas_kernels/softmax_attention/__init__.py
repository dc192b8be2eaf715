"""Causal grouped-query softmax attention, also of new queries against a cache."""
