"""The command line ``pqcodec``: one file a verb; the work is done by pqcodec and pqcodec.formats."""
