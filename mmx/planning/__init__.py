"""Planning: what a program would need of a machine nobody has at hand, and how fast it could be."""
