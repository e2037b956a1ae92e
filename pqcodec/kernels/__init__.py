"""The kernel families, and what they are given: jobs in host memory, groups of spans on a device."""
