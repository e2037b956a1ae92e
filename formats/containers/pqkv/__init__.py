"""The .pqkv file: frames that are appended, and a log of them (SPEC, Part II)."""
