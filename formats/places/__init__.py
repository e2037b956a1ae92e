"""Where files are: local folders and URLs, written whole or not at all, and locked while somebody writes."""
