"""How the tensors of a cache are encoded: which options each gets, by its name, role, layer and measured numbers."""
