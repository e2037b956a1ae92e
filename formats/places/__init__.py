"""Where files are kept: local folders and URLs, written whole or not at all; and a lock that survives a fork."""
