"""The experts of few tokens, mixed, where every expert that is chosen is read once."""
