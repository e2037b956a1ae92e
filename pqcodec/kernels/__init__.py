"""The kernel families and their work: jobs in host memory, groups of spans on a device.

Families are laid out alike: bits, numbers, offsets, rotation, split, paper, sides, blocks, and the backend that launches them.
"""
