"""Grouped-query attention to keys and values that lie in pages, for serving."""
