"""Plain tensors, which are not encoded: in .safetensors, .npz and .npy files, and in memory."""
