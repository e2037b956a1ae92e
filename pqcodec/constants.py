"""Law: every normative number of formats/SPEC.md stands here, once; no other module writes one down.

The section that defines a number is named beside it. Units are bits, coordinates and tokens.
"""

from __future__ import annotations

import struct

# -- Stream layout (SPEC 3) --------------------------------------------------------------------------------------
STREAM_MAGIC = b"\x89PQS"
STREAM_VERSION = 1
# magic, version, coding, dtype, ndim, header_bytes, flags, radius_bits, linear, row_bits, chunk_tokens, exact_tokens,
# exceptions, seed, offset_exponent, radius_exponent, codebook, states (for a trellis), exact_last
HEADER_STRUCT = struct.Struct("<4sBBBBIHBBIIIIQhhBBH")
OFFSET_EXPONENT_AT, RADIUS_EXPONENT_AT = 40, 42  # their bytes in the header
ROPE_STRUCT = struct.Struct("<QHB5s")  # first_position, rotated channels, pairing, reserved
AFFINE_STRUCT = struct.Struct("<IIBBBBH2s")  # tokens, channels, fields, place, pairing, angle_bits, outliers, reserved
KEEP_STRUCT = struct.Struct("<QB7s")  # tokens of the whole tensor, lists, reserved
SKETCH_STRUCT = struct.Struct("<BBBBHHII")  # matrix, blocks, outlier_blocks, reserved, channels, reserved, tokens, reserved
MAX_HEADER_BYTES = 2180
CHECKSUM_BYTES = 4

CODING_SPLIT = 1  # budget-splitting tree, fixed rate (SPEC 6)
CODING_PAPER = 2  # arXiv 2502.02617: 16-coordinate blocks of 62 bits (SPEC 7)
CODING_QUADS = 3  # four coordinates by one look-up, fixed rate (SPEC 8)
CODING_PAIRS = 4  # arXiv 2502.00527: radius and angle of each pair of channels (SPEC 14)
CODING_SCALAR = 5  # each number by a table of levels (SPEC 15)
CODING_RESIDUAL = 6  # arXiv 2410.15704: groups of channels as sums of vectors out of codebooks (SPEC 20)
CODING_SKETCH = 7  # arXiv 2406.03482: signs of random projections, which estimate inner products (SPEC 21)

DTYPE_FLOAT16, DTYPE_BFLOAT16, DTYPE_FLOAT32 = 1, 2, 3
ITEM_BYTES = {DTYPE_FLOAT16: 2, DTYPE_BFLOAT16: 2, DTYPE_FLOAT32: 4}
LARGEST_FINITE = {DTYPE_FLOAT16: 65504.0, DTYPE_BFLOAT16: 3.3895313892515355e38, DTYPE_FLOAT32: 3.4028234663852886e38}

FLAG_OFFSETS = 1  # a mean is stored per leading index
FLAG_ROPE = 2  # ... and turns with the position
FLAG_NUMPY = 4  # the encoder was given a numpy array
FLAG_TWO_ROUNDS = 8  # the rotation has two rounds; split coding only
FLAG_AFFINE = 16  # groups of numbers share fields (SPEC 13)
FLAG_OUTLIERS = 32  # blocks of scalar coding keep single numbers apart (SPEC 16.4)
FLAG_KEEP = 64  # the stream holds only some tokens, which it lists (SPEC 17)
FLAG_JOINED = 128  # vectors of all heads are coded as one (SPEC 18)
FLAG_BEFORE_ROPE = 256  # vectors are coded as they were before RoPE turned them (SPEC 19)
KNOWN_FLAGS = FLAG_OFFSETS | FLAG_ROPE | FLAG_NUMPY | FLAG_TWO_ROUNDS | FLAG_AFFINE | FLAG_OUTLIERS | FLAG_KEEP
FLAG_RUNS = 512  # offsets turn run by run, in whole numbers (SPEC 9.5)
KNOWN_FLAGS |= FLAG_JOINED | FLAG_BEFORE_ROPE | FLAG_RUNS
RUN_ROWS = 64  # of a run
RUN_TURN_BITS = 11  # behind the point, of a turn within a run
KEEP_SHARED, KEEP_EACH = 1, 2  # one list for all leading indices, or one for each; other values are reserved
LINEAR_NONE = 0  # the linear stage: none; other values are reserved
LINEAR_CHANNELS, LINEAR_BLOCKS, LINEAR_BASIS = 1, 2, 3  # channels chosen; one matrix for all blocks; a basis (SPEC 18)
LINEAR_SHARED = 4  # a basis that a shared table has
LINEAR_STRUCT = struct.Struct("<H6s")  # numbers of a row, reserved
LINEAR_BLOCK = 16  # channels of a block
STATES_NONE = 0  # no trellis; other values are reserved
CODEBOOK_CLOSED_FORM, CODEBOOK_CARRIED, CODEBOOK_NAMED = 0, 1, 2  # of SPEC 6, 7 and 15; levels in the header; of a shared table
LEVEL_BYTES = 2  # of a level: float16
TABLE_NAME_BYTES = 32  # of a shared table's name: its SHA-256
TABLE_MAGIC = b"\x89PQT"  # of a shared table (SPEC 16.3)
TABLE_VERSION = 1
TABLE_LEVELS, TABLE_VECTORS, TABLE_BASIS, TABLE_RANGES = 1, 2, 3, 4  # levels; codebooks of vectors (20.2); basis (18.3); 13.4
TABLE_STRUCT = struct.Struct("<4sBB2sI")  # magic, version, kind, reserved, numbers that follow
VECTORS_STRUCT = struct.Struct("<BBHHH")  # behind it: stages, bits of an index, channels of a group, head_dim, reserved
BASIS_STRUCT = struct.Struct("<HHI")  # likewise: numbers of a row, numbers of a row's vectors, reserved
RANGES_STRUCT = struct.Struct("<HHHBB")  # likewise: heads, numbers of a row, channels of a group, fields, reserved
MAX_RANGE_HEADS = 1024
MAX_BASIS_NUMBERS = 1 << 21  # of a shared table's basis
MAX_TABLE_BYTES = 4_196_372  # of any kind: codebooks of 8 stages, 4,096 entries, groups of 64 channels, head_dim 1024

# -- Caps (SPEC 3.3) ---------------------------------------------------------------------------------------------
MAX_NDIM = 8
MAX_HEAD_DIM = 1024  # ... and the most numbers of a row
MAX_JOINED_DIM = 4096  # numbers of the vectors that a linear stage makes a row of
MAX_NUMBERS_PER_BYTE = 2048  # of a stream: a row has 16 bits at least, and its vectors have 4,096 numbers at most
MAX_ELEMENTS = 1 << 48
MAX_CHUNK_TOKENS = 4096
MAX_TOKENS = 1 << 32
MAX_EXACT_LAST = (1 << 16) - 1
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

# -- Encoders of the split coding (SPEC 10) ----------------------------------------------------------------------
# A decoded vector is shorter than what it stands for, by half of its relative error and by what tables cut off. Radii are
# longer by that, .95 * 4^-bits a coordinate + .0024, so that norms are kept, but by .03 at most: near 2 bits the rest costs
# most error.
SPLIT_STRETCH, SPLIT_CUT_OFF, SPLIT_MOST_STRETCH = 0.95, 0.0024, 0.03

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

# -- Quads coding (SPEC 8) ---------------------------------------------------------------------------------------
QUADS_INDEX_BITS = (4, 5, 6, 7, 8, 9, 10)  # of a quad: its number in a table of 2^bits points
QUADS_RADIUS_BITS = 8
QUADS_RADIUS_STEPS = 8  # an octave
QUADS_RADII = (-1240, 1063)  # of a radius in steps: 2^-155 .. 2^132.875
QUADS_FACTOR_BITS = 22  # significant ones of a radius's factor
QUADS_BASE_BYTES = 2  # of a block: the radius that code 1 stands for, in steps
QUADS_BLOCK_ALIGN = 16  # bytes: a block's size is a multiple
QUADS_SIGN_PLACES = (0, 2, 1, 3)  # of a quad's four coordinates among the sign bits of a group
QUADS_GROUP = 8  # quads whose signs lie together
QUADS_EFFORTS = {"fast": (0,), "best": (0, -1, 1, -2, 2)}  # radii that the encoder tries, in steps from the vector's own
# By bits of an index: what encoders multiply a vector with before they look for points, so that its norm is kept: a nearest
# point is a little shorter than what it stands for. At 4 bits half of that, for there it costs most error.
QUADS_STRETCH = {4: 1.025, 5: 1.0375, 6: 1.0265, 7: 1.0185, 8: 1.013, 9: 1.009, 10: 1.0062}
QUADS_TABLES = {  # by bits: units in a radius, and the sorted representatives whose permutations are the points
    4: (
        52.25,
        "19 19 19 19, 63 23 23 23, 79 79 28 28, 124 32 32 32, 81 81 81 81",
    ),
    5: (
        52.8125,
        "16 16 16 16, 51 18 18 18, 60 60 21 21, 96 22 22 22, 70 70 70 24, 121 73 28 28, 86 86 86 86",
    ),
    6: (
        42.4375,
        "11 11 11 11, 30 30 11 11, 50 12 12 12, 38 38 38 14, 62 41 14 14, 86 16 16 16, 48 48 48 48, 73 45 45 17, "
        "98 66 21 21, 124 25 25 25, 78 78 78 30",
    ),
    7: (
        41.5625,
        "9 9 9 9, 25 25 9 9, 37 9 9 9, 27 27 27 27, 31 31 31 9, 47 29 10 10, 65 12 12 12, 55 33 33 12, "
        "37 37 37 37, 52 52 12 12, 78 39 13 13, 67 37 37 37, 61 61 39 14, 94 14 14 14, 52 52 52 52, 76 76 15 15, "
        "92 45 45 15, 80 80 45 45, 126 22 22 22, 78 78 78 16, 115 70 22 22",
    ),
    8: (
        37.3125,
        "18 6 6 6, 19 19 19 7, 30 19 7 7, 41 7 7 7, 22 22 22 22, 37 23 23 8, 36 36 8 8, 49 23 8 8, 36 36 23 23, "
        "50 21 21 21, 62 8 8 8, 43 43 27 7, 56 40 9 9, 59 28 28 8, 39 39 39 39, 72 27 10 10, 56 41 26 26, "
        "46 46 46 14, 59 59 11 11, 89 11 11 11, 69 51 33 11, 76 32 32 32, 83 48 11 11, 90 30 30 10, 60 60 38 38, "
        "61 61 61 14, 79 79 14 14, 93 49 49 19, 117 17 17 17, 82 82 48 18, 85 55 55 55, 113 57 19 19",
    ),
    9: (
        35.8125,
        "5 5 5 5, 8 8 8 8, 12 12 12 12, 20 12 5 5, 15 15 15 15, 30 6 6 6, 26 17 17 6, 25 25 5 5, 20 20 20 20, "
        "36 18 6 6, 44 6 6 6, 36 17 17 17, 31 31 15 5, 29 29 17 17, 28 28 28 6, 25 25 25 25, 42 21 21 6, "
        "50 19 7 7, 44 32 6 6, 44 32 17 17, 30 30 30 30, 59 7 7 7, 42 25 25 25, 39 39 25 6, 34 34 34 17, "
        "54 17 17 17, 55 32 18 6, 47 47 8 8, 65 22 7 7, 35 35 35 35, 43 43 25 25, 58 24 24 24, 53 34 34 10, "
        "44 44 44 6, 64 41 8 8, 51 51 26 8, 70 24 24 9, 78 9 9 9, 44 44 44 23, 54 34 34 34, 61 42 22 22, "
        "41 41 41 41, 60 60 10 10, 83 30 9 9, 75 28 28 28, 73 44 27 8, 62 45 45 14, 56 56 31 31, 47 47 47 47, "
        "69 41 41 41, 66 66 32 10, 98 11 11 11, 83 54 10 10, 92 29 29 11, 56 56 56 32, 82 51 28 28, 61 61 61 9, "
        "83 49 49 10, 79 79 12 12, 72 72 35 35, 57 57 57 57, 107 43 12 12, 99 38 38 38, 85 58 58 35, "
        "122 16 16 16, 82 82 50 13, 103 71 20 20, 111 46 46 14, 71 71 71 71",
    ),
    10: (
        34.375,
        "3 3 3 3, 5 5 5 5, 7 7 7 7, 14 5 5 5, 9 9 9 9, 11 11 11 11, 16 16 4 4, 14 14 14 3, 24 4 4 4, "
        "13 13 13 13, 21 9 9 9, 15 15 15 15, 16 16 16 16, 20 20 11 11, 29 14 5 5, 25 15 15 4, 24 24 5 5, "
        "18 18 18 18, 21 21 21 5, 37 5 5 5, 29 20 13 13, 20 20 20 20, 21 21 21 21, 28 28 14 4, 37 14 14 5, "
        "35 23 5 5, 25 25 25 12, 23 23 23 23, 43 16 5 5, 35 22 22 6, 24 24 24 24, 29 29 18 18, 34 34 5 5, "
        "40 17 17 17, 49 5 5 5, 38 27 13 13, 29 29 29 4, 47 12 12 12, 26 26 26 26, 27 27 27 27, 36 36 18 4, "
        "46 24 15 5, 37 23 23 23, 34 34 25 13, 46 31 5 5, 28 28 28 28, 55 17 6 6, 39 39 14 14, 43 28 28 6, "
        "30 30 30 30, 42 42 6 6, 53 17 17 17, 47 29 18 18, 31 31 31 31, 34 34 34 21, 36 36 36 6, 63 6 6 6, "
        "32 32 32 32, 59 18 18 5, 40 40 23 23, 51 37 17 6, 33 33 33 33, 59 30 6 6, 44 29 29 29, 43 43 27 6, "
        "48 32 32 17, 56 27 27 7, 65 14 14 14, 47 47 15 15, 49 49 6 6, 35 35 35 35, 61 29 14 14, 36 36 36 36, "
        "59 24 24 24, 70 19 6 6, 41 41 41 18, 54 37 37 6, 57 40 21 21, 38 38 38 38, 44 44 31 31, 44 44 44 5, "
        "49 49 31 16, 63 44 8 8, 53 53 20 5, 39 39 39 39, 70 25 25 6, 57 32 32 32, 40 40 40 40, 64 41 25 7, "
        "73 21 21 21, 81 7 7 7, 41 41 41 41, 75 33 8 8, 58 41 41 21, 43 43 43 43, 58 58 19 19, 61 61 7 7, "
        "70 34 34 19, 83 19 19 7, 74 39 19 19, 44 44 44 44, 54 54 31 31, 51 51 51 11, 49 49 49 30, 58 58 37 6, "
        "46 46 46 46, 61 41 41 41, 72 56 22 8, 70 49 28 28, 71 44 44 8, 48 48 48 48, 82 49 8 8, 85 40 25 8, "
        "89 25 25 25, 94 29 8 8, 62 62 42 21, 50 50 50 50, 99 9 9 9, 82 34 34 34, 73 73 9 9, 60 60 60 6, "
        "69 69 26 26, 61 61 42 42, 53 53 53 53, 76 49 49 29, 84 58 38 10, 62 62 62 24, 105 26 26 9, 77 77 30 8, "
        "92 55 27 27, 57 57 57 57, 96 66 13 13, 103 42 42 12, 76 76 55 11, 61 61 61 61, 76 76 41 41, "
        "97 43 43 43, 112 49 13 13, 83 53 53 53, 123 13 13 13, 70 70 70 39, 87 87 30 30, 118 33 33 33, "
        "93 93 12 12, 99 61 61 21, 67 67 67 67, 74 74 74 74",
    ),
}

# -- Offsets and RoPE (SPEC 9) -----------------------------------------------------------------------------------
ROPE_HALF, ROPE_INTERLEAVED = 1, 2
PHASE_BITS = 32  # a RoPE frequency is in turns per token, times 2^32
PHASE_TABLE_BITS = 8  # cos and sin from two tables of 256
OFFSET_EXPONENTS = (-112, 111)  # powers of two that scale the stored float16 offsets
RADIUS_EXPONENTS = (-125, 117)  # ... and the paper coding's float16 radii

# -- Affine fields (SPEC 13) -------------------------------------------------------------------------------------
AFFINE_ALL_TOKENS = 0  # reserved, where the number of a group's tokens stands: all of the tensor
AFFINE_SCALE, AFFINE_SCALE_ZERO, AFFINE_POLAR = 1, 2, 3  # what a group has
AFFINE_FIELD_BYTES = {AFFINE_SCALE: 2, AFFINE_SCALE_ZERO: 4, AFFINE_POLAR: 8}
AFFINE_IN_BLOCKS, AFFINE_IN_TABLE = 0, 2  # where fields stand; others are reserved, 1 for a section of the stream
AFFINE_EXPONENT_BYTES = 2  # of a block: the power of two that all its float16 fields are multiplied by
AFFINE_EXPONENTS = (-126, 127)
OUTLIER_COUNT_BYTES, OUTLIER_BYTES = 4, 4  # of a segment's count; of an outlier: its place, and float16
OUTLIER_SEGMENT = 1 << 16  # numbers of a block among which a place is told
AFFINE_USUAL = (2.0**-4, 2.0**14)  # largest magnitudes of a block for which encoders choose the exponent 0
AFFINE_USUAL_BITS = 14  # ... and below 2^14 is what they bring others to

# -- Residual VQ (SPEC 20) ---------------------------------------------------------------------------------------
RESIDUAL_SCALE_BITS = 16  # of a row: float16
RESIDUAL_STAGES = range(1, 9)
RESIDUAL_INDEX_BITS = range(4, 13)
RESIDUAL_GROUPS = (8, 16, 32, 64)  # channels

# -- Pair polar and scalar coding (SPEC 14, 15) ------------------------------------------------------------------
PAIR_CHANNELS = 2
PAIR_BITS = range(1, 9)  # of a radius, and of an angle
TURN = 1 << 16  # units of an angle in a turn
TURN_POLYNOMIAL = (  # of encoders: the angle in turns of a slope 0 .. 1, over the slope, in powers of its square; good to 2e-8
    -0.00074305835,
    0.00384616852,
    -0.00944856755,
    0.0157660429,
    -0.0223080879,
    0.0317820252,
    -0.0530494615,
    0.159154927,
)
TURN_TINY = 1e-37  # keeps a quotient of two zeros finite
SCALAR_BITS = range(1, 9)
KVQUANT_SPARSE = 0.01  # of a group's numbers that presets of KVQuant keep apart, half at each end
NUQ_TOKENS = 2048  # of a channel, which share scale and zero in presets for keys

# -- Sign sketch (SPEC 21) ---------------------------------------------------------------------------------------
SKETCH_ORTHOGONAL, SKETCH_INDEPENDENT = 1, 2  # matrices: blocks of rotations; numbers that are independent of each other
SKETCH_BLOCKS = range(1, 9)  # of N signs each
SKETCH_NORM_BITS = 16
SKETCH_EXPONENT_BYTES = 2  # of a block: the power of two that all its norms are multiplied by
SKETCH_EXPONENTS = (-126, 127)
SKETCH_NARROW = 256  # channels, up to which a number of one takes a byte
SKETCH_WORD_BITS = 64  # of an output of the PRNG, whose set bits less their mean are a number of an independent matrix
QJL_TOKENS = 32  # of a group in presets with outlier channels
SKETCH_SHRINK_BITS = 15  # of the factor that shrinks an estimate
# Of N times the error of an estimate, per sign: pi/2 - 1 of orthogonal blocks, pi/2 and -1 over N of independent numbers
SKETCH_ERROR_BITS = 16
SKETCH_ERRORS = {SKETCH_ORTHOGONAL: (37408, 0), SKETCH_INDEPENDENT: (102944, -65536)}

# -- Container (SPEC Part II) ------------------------------------------------------------------------------------
FILE_MAGIC = b"\x89PQF"
FILE_VERSION, GROWN_VERSION = 1, 2  # of a file that was written once, and of one that has grown since
FILE_HEAD_STRUCT = struct.Struct("<4sB7sI")  # magic, version, reserved, checksum of the bytes before it
FRAME_MAGIC = b"PQFR"
FRAME_STRUCT = struct.Struct("<4sB3sIQI")  # magic, kind, reserved, meta_bytes, body_bytes, checksum (of these and the meta)
FRAME_CHECKED = FRAME_STRUCT.size - CHECKSUM_BYTES  # bytes of a frame header that its checksum covers, before the meta
FOOTER_MAGIC = b"PQFE"
FOOTER_STRUCT = struct.Struct("<4sQQI")  # magic, offset of the index frame, file size, checksum of the bytes before it
FRAME_CODED, FRAME_EXACT, FRAME_METADATA, FRAME_INDEX, FRAME_TABLE = 1, 2, 3, 4, 6  # 5 is none: refusals.txt has it
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
    "float8_e8m0fnu": 1,
}

# -- Other containers (SPEC Part III) ----------------------------------------------------------------------------
LISTING_PREFIX, LISTING_FORMAT, LISTING_VERSION = "pqcodec_", "kv-cache", "1"
ZARR_FORMAT, ZARR_COMPLETE = "pqcodec.kv_cache", "complete"  # what a group says of itself, and the group that is written last
ZARR_TOKENS_PER_CHUNK = 4096  # of arrays that save_zarr writes, unless it is told otherwise

# -- Chunks of serving engines (SPEC IV.6) -----------------------------------------------------------------------
CHUNK_MAGIC = b"PQCH"
CHUNK_VERSION = 2
CHUNK_NAME_BYTES = 20  # of the SHA-256 of an object's name
CHUNK_STRUCT = struct.Struct("<4sIQI20sII")  # magic, version, size, streams, name, seal, checksum of all before
