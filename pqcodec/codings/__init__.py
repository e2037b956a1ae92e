"""How a rotated vector becomes bits and back: presets, the codings and their tables."""
