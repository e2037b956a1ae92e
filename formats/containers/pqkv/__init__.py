"""The .pqkv file (SPEC Part II): an append-only log of frames, its writer, reader and appender."""
