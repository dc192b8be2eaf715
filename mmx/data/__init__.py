"""Text to token shards, token shards to packed batches."""
