"""Law: every normative number of formats/SPEC.md stands here, once; no other module writes one down.

The section that defines a number is named beside it. Units are bits, coordinates and tokens.
"""

from __future__ import annotations

import struct

# -- Stream layout (SPEC 3) --------------------------------------------------------------------------------------
STREAM_MAGIC = b"\x89PQS"
STREAM_VERSION = 1
# magic, version, coding, dtype, ndim, header_bytes, flags, radius_bits, linear, row_bits, chunk_tokens, exact_tokens,
# exceptions, seed, offset_exponent, radius_exponent, codebook, reserved
HEADER_STRUCT = struct.Struct("<4sBBBBIHBBIIIIQhhB3s")
OFFSET_EXPONENT_AT, RADIUS_EXPONENT_AT = 40, 42  # their bytes in the header
ROPE_STRUCT = struct.Struct("<QHB5s")  # first_position, rotated channels, pairing, reserved
CHECKSUM_BYTES = 4

CODING_SPLIT = 1  # budget-splitting tree, fixed rate (SPEC 6)
CODING_PAPER = 2  # arXiv 2502.02617: 16-coordinate blocks of 62 bits (SPEC 7)

DTYPE_FLOAT16, DTYPE_BFLOAT16, DTYPE_FLOAT32 = 1, 2, 3
ITEM_BYTES = {DTYPE_FLOAT16: 2, DTYPE_BFLOAT16: 2, DTYPE_FLOAT32: 4}
LARGEST_FINITE = {DTYPE_FLOAT16: 65504.0, DTYPE_BFLOAT16: 3.3895313892515355e38, DTYPE_FLOAT32: 3.4028234663852886e38}

FLAG_OFFSETS = 1  # a mean is stored per leading index
FLAG_ROPE = 2  # ... and turns with the position
FLAG_NUMPY = 4  # the encoder was given a numpy array
FLAG_TWO_ROUNDS = 8  # the rotation has two rounds; split coding only
KNOWN_FLAGS = FLAG_OFFSETS | FLAG_ROPE | FLAG_NUMPY | FLAG_TWO_ROUNDS
LINEAR_NONE = 0  # the linear stage before the rotation: none; other values are reserved
CODEBOOK_CLOSED_FORM = 0  # cells and centroids of SPEC 6 and 7; other values are reserved

# -- Caps (SPEC 3.3) ---------------------------------------------------------------------------------------------
MAX_NDIM = 8
MAX_HEAD_DIM = 1024
MAX_ELEMENTS = 1 << 48
MAX_CHUNK_TOKENS = 4096
MAX_TOKENS = 1 << 32
DEFAULT_CHUNK_TOKENS = 64

# -- PRNG and checksum (SPEC 4) ----------------------------------------------------------------------------------
SPLITMIX_GAMMA = 0x9E3779B97F4A7C15
SPLITMIX_MUL_1 = 0xBF58476D1CE4E5B9
SPLITMIX_MUL_2 = 0x94D049BB133111EB
CHECKSUM_PRIME = 4294967291  # 2^32 - 5
CHECKSUM_SEED = 0x5051636865636B31

# -- Rotation (SPEC 5) -------------------------------------------------------------------------------------------
GROUP = 16  # coordinates; the order of the rotation is a multiple
HADAMARD_BASES = (1, 12, 20, 28, 36)
PALEY_PRIME = {12: 11, 20: 19, 28: 13, 36: 17}
ROTATION_ORDERS = tuple(
    sorted(n for base in HADAMARD_BASES for n in (base << k for k in range(11)) if n % GROUP == 0 and n <= MAX_HEAD_DIM)
)
PERMUTATION_SEED = 3  # of the permutation between two rounds
GRID = 2048  # unit-norm coordinates are rounded to multiples of 1/2048

# -- Radius (SPEC 6.1) -------------------------------------------------------------------------------------------
RADIUS_BITS = (11, 12, 13, 14, 15)
RADIUS_STEPS_PER_OCTAVE = {bits: 7 << (bits - 11) for bits in RADIUS_BITS}
RADIUS_BIAS = 155  # code 1 is the radius 2^-155
RADIUS_SPLIT = -100  # below 2^-100 the scale is applied in two factors
RADIUS_SHIFT = 64  # ... the second of which is 2^-64

# -- Tree (SPEC 6.2 to 6.4) --------------------------------------------------------------------------------------
QUAD = 4  # coordinates of a leaf
MAX_BUDGET_PER_COORDINATE = 7  # bits
MAX_ANGLE_BITS = 7
CELL_SPREAD, CELL_SPREAD_OFFSET, CELL_SPREAD_SMALL = 1.03, 2.0, 0.75
FINE_GRID_BITS, COARSE_GRID_BITS = 14, 10  # cell boundaries in sin^2, above and up to 16 coordinates
MAX_QUAD_CELLS = 128
MAX_CIRCLE_CELLS = 512
CIRCLE = 2048  # directions of the level-1 table
PHASE_SHIFT = 16

# -- Paper coding (SPEC 7) ---------------------------------------------------------------------------------------
PAPER_BLOCK = 16
PAPER_BLOCK_BITS = 62
PAPER_RADIUS_BITS = 16
PAPER_LEVEL_BITS = (4, 2, 2, 2)  # levels 1 to 4
PAPER_ANGLES = {  # two of the four centroids of levels 2 to 4, in radians; the others are their mirror images
    2: (0.30974, 0.63397),
    3: (0.42624, 0.67438),
    4: (0.52420, 0.70590),
}

# -- Offsets and RoPE (SPEC 8) -----------------------------------------------------------------------------------
ROPE_HALF, ROPE_INTERLEAVED = 1, 2
PHASE_BITS = 32  # a RoPE frequency is in turns per token, times 2^32
PHASE_TABLE_BITS = 8  # cos and sin from two tables of 256
OFFSET_EXPONENTS = (-112, 111)  # powers of two that scale the stored float16 offsets
RADIUS_EXPONENTS = (-125, 117)  # ... and the paper coding's float16 radii

# -- Container (SPEC Part II) ------------------------------------------------------------------------------------
FILE_MAGIC = b"\x89PQF"
FILE_VERSION, GROWN_VERSION = 1, 2  # of a file that was written once, and of one that has grown since
FILE_HEAD_STRUCT = struct.Struct("<4sB7sI")  # magic, version, reserved, checksum of the bytes before it
FRAME_MAGIC = b"PQFR"
FRAME_STRUCT = struct.Struct("<4sB3sIQI")  # magic, kind, reserved, meta_bytes, body_bytes, checksum (of these and the meta)
FRAME_CHECKED = FRAME_STRUCT.size - CHECKSUM_BYTES  # bytes of a frame header that its checksum covers, before the meta
FOOTER_MAGIC = b"PQFE"
FOOTER_STRUCT = struct.Struct("<4sQQI")  # magic, offset of the index frame, file size, checksum of the bytes before it
FRAME_CODED, FRAME_EXACT, FRAME_METADATA, FRAME_INDEX = 1, 2, 3, 4
ROLES = ("key", "value", "other")
MAX_META_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_EXACT_NDIM = 32
EXACT_ITEM_BYTES = {  # dtypes of exact tensors and the bytes of a number
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
}

# -- Other containers (SPEC Part III) ----------------------------------------------------------------------------
LISTING_PREFIX, LISTING_FORMAT, LISTING_VERSION = "pqcodec_", "kv-cache", "1"
ZARR_FORMAT, ZARR_COMPLETE = "pqcodec.kv_cache", "complete"  # what a group says of itself, and the group that is written last
ZARR_TOKENS_PER_CHUNK = 4096  # of arrays that save_zarr writes, unless it is told otherwise
