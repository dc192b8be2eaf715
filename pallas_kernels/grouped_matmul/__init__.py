"""Matrix products of consecutive row groups, each with a matrix of its own (the experts)."""
