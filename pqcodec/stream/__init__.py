"""What a stream is: its header, its sections, the places of its blocks, its checksums; nothing here codes a vector."""
