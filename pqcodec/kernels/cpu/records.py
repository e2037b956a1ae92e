"""Law: what the kernels share: how they are compiled, and the records, the named groups of arrays and numbers, that they take.

numba compiles a NamedTuple as it does a plain tuple, but takes a microsecond to unpack one that Python hands over. So records
cross that border as plain tuples (``plain``), and a kernel's first lines make them records again. Arrays of a tile hold eight
lanes for each coordinate or node.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pqcodec.constants import COARSE_GRID_BITS, MAX_ANGLE_BITS
from pqcodec.kernels.cpu.disk_cache import kept

F32, I32, I64, U64 = np.float32, np.int32, np.int64, np.uint64
TINY = np.float32(1e-37)  # keeps a quotient of two zeros finite

_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
jit = kept(**_OPTIONS)
# For kernels that allocate nothing: without reference counting of their arrays they take a third less time. They are inlined,
# because an array is seven arguments.
leaf = kept(**{**_OPTIONS, "_nrt": False, "forceinline": True})
inlined = kept(**{**_OPTIONS, "inline": "always"})


def plain(record: tuple) -> tuple:
    """A record, and the records in it, as plain tuples."""
    return tuple(plain(x) if isinstance(x, tuple) else x for x in record)


# -- what a launch is about ----------------------------------------------------------------------------------------------
class Kind(NamedTuple):
    """Numbers of a kind of streams."""

    coding: int
    dtype: int
    head_dim: int
    order: int
    row_bytes: int
    beside: int  # bytes of a block that are no rows, its checksum among them
    align: int  # a block's size is a multiple
    chunk_tokens: int  # tokens of a block, at the most


class RowSource(NamedTuple):
    """A tensor that is read: element start + token * stride is a lead's token's first."""

    flat: np.ndarray  # float32, or the bits of 16-bit numbers as uint16
    starts: np.ndarray  # int64 [leading]
    stride: int
    leading: int
    first_tokens: int  # exact ones, which are not coded
    coded_tokens: int


class Output(NamedTuple):
    """How decoded rows are stored."""

    like: np.ndarray  # [1] of the dtype in which they are stored
    limit: np.float32  # the dtype's largest finite number
    write: bool  # whether rows are decoded at all, or blocks only checked
    past: bool  # by non-temporal stores; every eight numbers of a row must be aligned


class Item(NamedTuple):
    """A block that is decoded: int64. As ``ITEM``, where each number stands in a row of ``items``."""

    tokens: int
    low: int  # rows low .. high - 1 are wanted
    high: int
    source: int  # address of the block's bytes
    target: int  # address of row 0 in the result
    offset: int  # address of its offset, float32 [order]; 0: none
    stride: int  # elements from one row of the result to the next
    position: int  # of row 0 under RoPE, or its place in ``RopeTable.listed``
    lead: int  # leading index of rows, where ``Groups.shared`` has fields of each; else 0


ITEM = Item(*range(len(Item._fields)))


# -- the stages ------------------------------------------------------------------------------------------------------------
class RopeTable(NamedTuple):
    """Pair i is the channels pair_p * i and pair_p * i + step: (1, pairs) is half-split, (2, 1) is interleaved."""

    frequencies: np.ndarray  # uint32 [pairs]; none without RoPE
    pair_p: int
    step: int
    first_position: int  # of the tensor's first token; 0 with a list of positions
    phases: np.ndarray  # float32 [1024]: cos and sin side by side of the coarse turns, then of the fine ones
    listed: np.ndarray  # uint32: the positions of kept tokens, all lists one behind the other; none: a token is its position
    list_tokens: int  # from one leading index's list to the next, 0 where they share one
    to_halves: np.float32  # offsets times it are numbers of float16, where they turn run by run; 0: token by token


class Turning(NamedTuple):
    """An offset, and the phases of a block's tokens, as ``narrow_sixteen`` adds it to eight tokens at once."""

    there: bool  # whether there is one
    along: np.ndarray  # float32 [order]: what each channel's cosine is multiplied by
    across: np.ndarray  # float32 [order]: what its sine is multiplied by
    places: np.ndarray  # int64 [order]: of its pair in a tile's phases
    cos: np.ndarray  # float32 [tiles, pairs + 1, lanes]: of tiles of a block; the last pair does not turn
    sin: np.ndarray


class OffsetRun(NamedTuple):
    """An offset at the first row of a run, and what it is found by, where offsets turn run by run."""

    offset: np.ndarray  # float32 [order]
    cos: np.ndarray  # float32 [runs * pairs + lanes]: of the first rows of a block's runs
    sin: np.ndarray
    filled: np.ndarray  # int64 [2]: of these, see ``offsets.keep_phases``
    first: np.ndarray  # float32 [pairs + lanes]: scratch, a pair's numbers
    second: np.ndarray


class Rotation(NamedTuple):
    """How a tile is rotated, or back."""

    signs: np.ndarray  # float32 [order]: of the tensor's coordinates
    flips: np.ndarray  # int32 [order * lanes]: the same as bits that change a float32's sign, or 0, once for every lane
    base: np.ndarray  # int64 [b, b / 4]: how to add up H's base (``base_stage``); [0, 0] where it is 1
    places: np.ndarray  # int64 [order]: of each coordinate between two rounds; [0] with one round
    between: np.ndarray  # float32 [order * lanes]: the signs there, once for every lane
    pair_places: np.ndarray  # int64 [order]: the same in ``pairs`` (``rotate_begun_back``); [0] where they are not used
    pair_signs: np.ndarray  # int16 [order * lanes * 2]: what the two numbers of a pair are multiplied by, for every lane


# signs of the sums of four coordinates that ``base_stage`` makes, in their order
SUMS = tuple(
    (one, one * first, one * second, one * third)
    for first in (1, -1)
    for one in (1, -1)
    for second, third in ((1, 1), (1, -1), (-1, 1), (-1, -1))
)


# -- the split coding --------------------------------------------------------------------------------------------------
CODEBOOK_BUDGET = 13  # bits; quads of up to so many are listed point by point, which takes 256 KiB
SMALL_BUDGETS = 3.2  # bits a coordinate, above which too many quads have more than CODEBOOK_BUDGET
WIDTHS = MAX_ANGLE_BITS + 1
CODES = 2 << MAX_ANGLE_BITS
BOUNDS = (1 << MAX_ANGLE_BITS) + 1
STEPS = 1 << COARSE_GRID_BITS
OF_QUADS, EVEN, UNEVEN = 0, 1, 2  # shapes of nodes: above two quads, above two other equal children, above unequal ones


class EncoderTree(NamedTuple):
    """A tree as the encoder reads it. Internal nodes come first, then quads; tables of nodes are by kind."""

    kind: np.ndarray  # [internal nodes]
    left: np.ndarray  # node numbers of the children
    right: np.ndarray
    m_a: np.ndarray  # int32 [kinds]: coordinates of the left child
    m_b: np.ndarray
    per_bit: np.ndarray  # float32 [kinds]: 16 / (15 coordinates)
    portions: np.ndarray  # int32 [kinds * budgets]: the left child's portion
    grids: np.ndarray  # float32 [kinds]: steps of the sin^2 grid
    shift: np.ndarray  # of ``look_ups.NodeArrays``, flat
    look_up: np.ndarray
    bounds: np.ndarray
    grid_shift: np.ndarray
    fixes: np.ndarray


class EncoderQuads(NamedTuple):
    """Quads as the encoder reads them."""

    by_budget: np.ndarray  # int32 [budgets * 2]: codes in a cell, first record
    look_up: np.ndarray  # uint8 [budgets * 1024]: the cell of each place
    by_record: np.ndarray  # int32 [records * 2]: n_a, n_b


class Node(NamedTuple):
    """A node as the decoder reads it: int64. As ``NODE``, where each number stands in a node's part of ``steps``."""

    left: int  # the child's place in arrays of nodes, in lanes
    right: int
    cap_a: int  # the children's largest budgets
    cap_b: int
    codes: int  # where its kind's codes begin in ``nodes``
    shape: int  # OF_QUADS, EVEN or UNEVEN
    portions: int  # where its kind's portions begin
    unused: int


NODE = Node(*range(len(Node._fields)))


class DecoderTree(NamedTuple):
    """A tree as the decoder goes through it, node by node."""

    steps: np.ndarray  # int64 [internal nodes * NODE]
    per_bit: np.ndarray  # float32 [internal nodes]: 16 / (15 coordinates)
    portions: np.ndarray  # int32 [kinds * budgets]
    nodes: np.ndarray  # int32 [kinds * codes * 4]: bits of cos and sin, shift, 0


class DecoderQuads(NamedTuple):
    """Quads as the decoder reads them."""

    by_budget: np.ndarray  # int32 [budgets * 4]: codes in a cell, first record, last cell, bits of 1 / codes
    by_record: np.ndarray  # int32 [records * 8]: bits of cos and sin, n_b, bits of 1 / n_b, K_a, K_b, 0, 0
    codebook: np.ndarray  # float32: the points at radius 1 of small quads, entry 4 * (2^budget + code)


class SplitEncoder(NamedTuple):
    """What encoding rows of the split coding takes."""

    radius_bits: int
    radius_steps: int  # an octave
    root_budget: int
    energy_scale: float  # energy of a rotated vector over the square of its radius
    tree: EncoderTree
    quads: EncoderQuads


class SplitDecoder(NamedTuple):
    """What decoding rows of the split coding takes."""

    radius_bits: int
    root_budget: int
    radii: np.ndarray  # float32 [2, codes]: both factors of each radius code
    circle: np.ndarray  # float32 [4096]: cos and sin of the 2,048 directions, side by side
    tree: DecoderTree
    quads: DecoderQuads


class SplitEncoderWork(NamedTuple):
    """Scratch of a tile: of every node, internal ones first, but for ``cells`` of quads and ``turns`` of pairs."""

    turns: np.ndarray  # float32: the pairs' angles
    energy: np.ndarray  # float32
    places: np.ndarray  # int32: on the node's sin^2 grid
    bit_place: np.ndarray  # int32: the row's bit at which the node's bits begin
    budget: np.ndarray  # int32
    codes: np.ndarray  # int32
    widths: np.ndarray  # int32: of internal nodes' angles
    cells: np.ndarray  # int32: codes below a quad's cell


class SplitDecoderWork(NamedTuple):
    """Scratch of a tile: of every node, internal ones first."""

    bits: np.ndarray  # int32: the row's bit at which an internal node's bits begin; a quad's own bits
    budget: np.ndarray  # int32
    radius: np.ndarray  # float32
    entries: np.ndarray  # int32: of look-ups, of quads
    phases: np.ndarray  # int32: of pairs
    listed: np.ndarray  # int32: the quads that the codebook does not list


# -- the quads coding ----------------------------------------------------------------------------------------------------
QUADS_TIES = ((4,), (3, 1), (1, 3), (2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1, 1))  # how many coordinates are equal


class QuadsEncoder(NamedTuple):
    """What encoding blocks of quads takes."""

    bits: int  # of an index
    sign_bytes: int  # of a row
    index_bytes: int
    energy_scale: int  # squared norm of a rotated vector over the mean square of its coordinates
    choices: np.ndarray  # int32: radii that are tried, in steps from a vector's own
    inverse: np.ndarray  # float32 [steps an octave]: what rotated vectors are multiplied by
    representatives: np.ndarray  # float32 [r * 6]: different coordinates, minus half the squared norm, its own number
    runs: np.ndarray  # int64 [9]: where the representatives of each of QUADS_TIES begin, and where they end
    numbers: np.ndarray  # int32 [r * 64]: of the points, by representative and the places of the three largest


class QuadsDecoder(NamedTuple):
    """What decoding blocks of quads takes."""

    bits: int
    sign_bytes: int
    index_bytes: int
    radii: np.ndarray  # float32 [2, radii]: both factors of each radius, from the least on
    points: np.ndarray  # int32 [points]: of each the bytes of four coordinates, in the order of QUADS_SIGN_PLACES


class QuadsEncoderWork(NamedTuple):
    """Scratch of a tile, and the radii of a block."""

    energy: np.ndarray  # float32 [lanes]
    codes: np.ndarray  # int32 [quads * lanes]
    trial: np.ndarray  # the same
    packed: np.ndarray  # uint64 [2 * groups * lanes]
    own: np.ndarray  # int32 [tokens + lanes]: radii of the vectors themselves, in steps
    radius: np.ndarray  # the same of those that were chosen


# -- the paper coding ----------------------------------------------------------------------------------------------------
class PaperEncoder(NamedTuple):
    """What encoding rows of the paper's coding takes."""

    radius_exponent: int
    bounds: np.ndarray  # [3, 3]: of levels 2 to 4 in tan psi, squared


class PaperDecoder(NamedTuple):
    """What decoding rows of the paper's coding takes."""

    radius_exponent: int
    mantissa: np.float32  # of the rows' factors
    cos: np.ndarray  # float32 [3, 4]: of levels 2 to 4
    sin: np.ndarray
    circle: np.ndarray  # as ``SplitDecoder``'s


# -- codings whose rows share affine fields ------------------------------------------------------------------------------
class Groups(NamedTuple):
    """Groups that share fields, and how their coding takes them."""

    tokens: int
    channels: int
    field_bytes: int  # of the groups of the same tokens
    bits: int  # of a number; of pair polar of a radius
    angle_bits: int
    half: int  # pairs that stand for channels of a vector
    interleaved: bool
    zeros: bool  # whether numbers have a zero beside their scale
    shortest: bool  # whether the encoder looks for the shortest arc
    levels: np.ndarray  # float32 [2^bits]: those of a codebook; [0] without one
    bounds: np.ndarray  # float32 [2^bits]: the middles between them, as ``tables`` has them for a bisection
    outliers: int  # as ``Affine.room`` tells: at each end of the range of a whole group; 0: none are kept
    ends: int  # of the groups of the same tokens; 1 where outliers are counted for all groups
    shared: np.ndarray  # uint8: every head's fields, where a shared table has them for all tokens
    shared_bytes: int  # of a head's; 0: blocks have fields


class Outliers(NamedTuple):
    """Single numbers of a block that are kept apart, and scratch; all [0] where there are none."""

    places: np.ndarray  # uint16 [room]
    values: np.ndarray  # uint16 [room + lanes]: bits of float16
    counts: np.ndarray  # int64 [segments]
    shorts: np.ndarray  # uint16 [lanes]
    one: np.ndarray  # float32 [lanes]
    targets: np.ndarray  # int32 [room]: where a decoder puts them, counted from a block's first row on
    numbers: np.ndarray  # float32 [room + lanes]: what it puts there
    state: np.ndarray  # int64 [2]: of a decoder


class GroupWork(NamedTuple):
    """Fields of a group of tokens as numbers, and scratch."""

    start: np.ndarray  # float32 [order]: where radii begin; of scalar coding zeros
    step: np.ndarray  # float32 [order]: of radii; of scalar coding scales
    first: np.ndarray  # float32 [order]: where angles begin; of scalar coding each group's scale
    span: np.ndarray  # float32 [order]: of angles; of scalar coding each group's zero
    low: np.ndarray  # float32 [order]: where the range of each group of scalar coding begins, without its outliers
    high: np.ndarray  # float32 [order]: where it ends
    least: np.ndarray  # float32 [``ranges.list_numbers``]: lists of the smallest numbers
    most: np.ndarray  # of the largest ones
    cos: np.ndarray  # float32 [2^angle_bits * pairs]: of each angle of each pair
    sin: np.ndarray
    one: np.ndarray  # float32 [lanes]
    other: np.ndarray
    places: np.ndarray  # int32 [order]: 0, 1, 2 ...
    used: np.ndarray  # int32 [order]: of an encoder of scalar coding, ``scalar.lanes_used`` of each channel
    codes: np.ndarray  # int32 [order]: of a row
    shorts: np.ndarray  # uint16 [2 * order + lanes]: fields as they stand
    steps: np.ndarray  # int32 [lanes]: ``affine_fields.fill_steps``
    shifts: np.ndarray  # int32 [lanes]
    apart: Outliers


# -- residual VQ ---------------------------------------------------------------------------------------------------------
class ResidualBooks(NamedTuple):
    """What decoding rows of residual VQ takes."""

    stages: int
    index_bits: int
    width: int  # channels of a group
    scale: np.float32  # a power of two: that of all rows
    channels: np.ndarray  # int64 [order]: of the first group, then of the second, and so on
    entries: np.ndarray  # float32 [table's stages * 2^index_bits * width]


# -- the sign sketch -----------------------------------------------------------------------------------------------------
class SketchTable(NamedTuple):
    """What coding blocks of a sign sketch takes; rotations are those of ``Rotation``, a row for each block of S."""

    blocks: int  # of signs
    outlier_blocks: int
    channels: int  # outlier channels of a group; 0: there are none
    tokens: int  # of a group
    list_bytes: int  # of a group
    scales: np.ndarray  # float32 [4]: M and h of the part without outlier channels, and of theirs
    signs: np.ndarray  # float32 [most blocks, order]
    between: np.ndarray
    base: np.ndarray
    places: np.ndarray
    dense: np.ndarray  # int8 [most blocks * order * order]: T of independent numbers; [0] of rotations


class SketchQueries(NamedTuple):
    """Queries of all leading indices, flat float32, as scores of a sketch take them; eight rows stand side by side."""

    rows: int  # of a leading index
    width: int  # numbers of a query in ``alone``
    scale: np.float32  # of ``columns``, a power of two
    alone: np.ndarray  # [leading, rows, width]
    eights: np.ndarray  # [leading, rows / 8, order, 8]
    columns: np.ndarray  # [order, projections]: of all blocks of S


class SketchSums(NamedTuple):
    """Sums of the projections of eight queries, and scratch; of eight queries side by side where nothing else is said."""

    inner: np.ndarray  # float32 [projections / 4, 16, 8]: of every four with each of their signs, without outlier channels
    outer: np.ndarray  # the same of outlier channels alone
    totals: np.ndarray  # float32 [8 rows, 8]
    factors: np.ndarray  # float32 [2, 8 rows]: of both parts
    shorts: np.ndarray  # uint16 [8 rows]
    apart: np.ndarray  # float32 [order]: 1 of the outlier channels of a group
    listed: np.ndarray  # int64 [order]: which these are
    every: np.ndarray  # int64 [order]: all channels
    whole: np.ndarray  # float32 [projections, 8]: products with S, of all channels
    left: np.ndarray  # without outlier channels
    moved: np.ndarray  # of these alone


# -- attention -----------------------------------------------------------------------------------------------------------
class AttentionPart(NamedTuple):
    """A run of tokens and some leading indices, which one task attends to: int64. As ``PART``."""

    tokens: int  # of the run
    first_key: int  # items of keys: first, last + 1
    last_key: int
    first_value: int
    last_value: int
    first_exact_key: int  # exact vectors: first, last + 1
    last_exact_key: int
    first_exact_value: int
    last_exact_value: int
    first_lead: int
    last_lead: int
    part: int  # its number among the runs
    first_token: int  # of the tensor


class AttentionItem(NamedTuple):
    """A chunk's rows among the tokens of a part, all leading indices: int64. As ``ATTENTION_ITEM``."""

    tokens: int  # of a block
    low: int  # rows low .. high - 1 are wanted
    high: int
    source: int  # address of the first leading index's block
    size: int  # bytes of a block, its checksum included
    at: int  # the place of row ``low`` among the part's tokens
    position: int  # of row 0 under RoPE
    chunk: int  # its number among those that are checked


PART = AttentionPart(*range(len(AttentionPart._fields)))
ATTENTION_ITEM = AttentionItem(*range(len(AttentionItem._fields)))


class RowDecoders(NamedTuple):
    """How rows of a stream become coordinates: what each coding takes, of which one is the stream's."""

    coding: int
    order: int
    row_bytes: int
    quads: QuadsDecoder
    split: SplitDecoder
    paper: PaperDecoder


class RowQueries(NamedTuple):
    """Rows of queries, four to a group, the last ones padded with zeros; all float32 but ``bounds``, and flat."""

    rows: int
    turned: np.ndarray  # [leading, groups, order, 4]: rotated, and divided by ``factors``
    factors: np.ndarray  # [leading, 4 groups]: powers of two
    constants: np.ndarray  # [leading, 4 groups]: what the offsets that do not turn add to each score
    phases: np.ndarray  # [leading, groups, pairs, 2, 4]: what the cosine and the sine of each pair's angle are multiplied by
    bounds: np.ndarray  # int64 [rows, 2]: the tokens that a row sees, first and last + 1
    softcap: np.float32  # 0: none


class AttentionScratch(NamedTuple):
    """Scratch of a task."""

    entries: np.ndarray  # int32 [tile, quad, lane]: indices of a run's quads
    signs: np.ndarray  # int32 [tile, group, lane]: the words that hold their signs
    steps: np.ndarray  # int32 [2 * lanes]
    cos: np.ndarray  # float32 [pairs, RUN]: phases of a run
    sin: np.ndarray
    first: np.ndarray  # float32 [lanes]: the factors of a tile
    second: np.ndarray
    dots: np.ndarray  # float32 [4 * lanes]
    x: np.ndarray  # float32 [order, lanes]: coordinates of a tile of another coding
    words: np.ndarray  # uint64 [lanes * words]: its rows
    work: SplitDecoderWork


class ExactParts(NamedTuple):
    """Exact vectors of keys, then of values, part by part."""

    keys: np.ndarray  # int64 [n, 2]: leading index, place among the part's tokens
    scores: np.ndarray  # float32 [n, rows]
    values: np.ndarray  # int64 [m, 2]
    weights: np.ndarray  # float32 [m, rows], to be filled


class PartSums(NamedTuple):
    """What is filled, part by part."""

    out: np.ndarray  # float32 [parts, leading, rows, order]: sums of weights times rotated values, times 2^-exponent
    exponents: np.ndarray  # int64 [parts, leading]
    maximum: np.ndarray  # float32 [parts, leading, rows]
    total: np.ndarray
