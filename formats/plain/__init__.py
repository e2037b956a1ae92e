"""Plain tensors, in other people's files and in memory; nothing here is encoded."""
