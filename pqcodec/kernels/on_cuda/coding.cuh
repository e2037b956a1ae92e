// Law: which coding the rows have, and what the file of a coding brings.
//
//     place_of_word(word)
//         Where a word of a tile's rows lies in the warp's stage; compiled.py gives the stage its size.
//     LARGEST_SUM, for decoders
//         The rotation makes no sum of a row's coordinates that is larger.
//     decode_row(tables, block, stage, tile_row, quarter, quads, factor, second_factor)
//         A row's bits -> a lane's coordinates ``quads`` [QUADS][2], whole numbers, as operands of the rotation (one round:
//         packed float16; two rounds: bytes); and the two factors that the row's numbers are multiplied with after it.
//     encode_row(tables, block, stage, radii, tile_row, quarter, quads, energies, own, exponent)
//         A lane's coordinates ``quads`` [QUADS][4], their energies, and the energy of all of them, ``own``, of a row that was
//         multiplied with 2^exponent -> the row's bits, in a stage that held zeros, if the coding does not say STORED: that it
//         writes every word. ``radii``: u16, where those of the tile's rows are kept with PLANES.
//
// Rows lie one behind the other in a block, but where PLANES says otherwise: then planes.cuh takes a tile's parts from the stage,
// where the coding leaves them as it pleases, but for the rows' ``radii``, which wait for the block's end. WIDE: a lane holds two
// rows of a tile of sixteen, and the coding brings
//
//     encode_two_rows(tables, stage, radii, lane, stored, energies, exponents, multiplied)
//         A lane's channels of both rows as they are multiplied, times 2^exponent each, and their energies -> the bits of both.
//         ``multiplied`` is called when registers of the channels are free.
//
// FACTORS: the coding ends the rotation of a tile's eight rows, and brings
//
//     encode_in_factors(tables, stage, radii, lane, words, energy, exponent)
//         What rotation_in_factors makes of a lane's channels, times 2^exponent, and the row's energy -> the row's bits.
//
// A new coding is a file here, a branch below, its macro in compiled.py and its tables in tables.py.
//
// Needs PAPER, PLANES, WIDE, FACTORS, and DECODER or ENCODER.
#pragma once

#if PLANES
#include "quads_encoder.cuh"
#elif PAPER
#include "paper.cuh"
#elif defined(DECODER)
#include "split_decoder.cuh"
#else
#include "split_encoder.cuh"
#endif
