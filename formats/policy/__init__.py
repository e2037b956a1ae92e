"""Which encode options each tensor of a cache gets, by its name, role, layer and energy."""
