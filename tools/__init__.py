"""Law: the command line: one verb, one file; what a verb does is done by pqcodec and pqcodec.formats."""
