"""Tensors of torch and numpy as the codec sees them: rows of stored numbers, and these as float32."""
