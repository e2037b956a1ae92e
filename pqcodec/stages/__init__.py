"""What is done to a vector before it is coded, and undone after: the mean subtracted, the rotation."""
