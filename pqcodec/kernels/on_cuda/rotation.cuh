// Law: the rotation (SPEC 5): tensor cores multiply tiles with the rotation's matrix; one file for each number of rounds.
//
// The instruction mma multiplies 16 rows of inputs with a matrix of eight columns, and adds up 16 (or, of bytes, 32) inputs in
// a step. Of 16 inputs, lane quarter q brings numbers 2 q, 2 q + 1, 2 q + 8 and 2 q + 9; of eight columns' sums it gets numbers
// 2 q and 2 q + 1. A tile has eight rows, so each row gives two of mma's rows: two parts, whose sums are joined afterwards.
//
// A decoder multiplies coordinates to get channels, an encoder channels to get coordinates. Which input and which column has
// which number may be chosen, so that lanes hold of both what lanes.cuh says, and no number has to change lanes.
//
// The decoder's sums are whole numbers below 2^24, which are exact in every order. An encoder may round.
//
// Each file brings, for decoders:
//     BackRotation(tables, lane), with eight_channels(tables, quads, quarter, piece, numbers)
//         A lane's channels of a row, from its coordinates, a piece at a time, in ascending order.
// and for encoders:
//     rotate_stored<TOGETHER>(tables, lane, stored, quads)
//         A lane's coordinates, from its channels of a row as they are stored: 16-bit numbers, without offsets.
//     rotate_numbers<TOGETHER>(tables, lane, numbers, scale, wrong, quads)
//         A lane's coordinates, from its channels as float32, times ``scale``; zeros of a row that is ``wrong``.
// ``quads`` are a lane's coordinates, as coding.cuh says. TOGETHER: by four warps, if there are warpgroups. Codings that take
// rows as they are multiplied (AS_WORDS) call what stands in the file; of rotation_in_factors, that is all.
//
// Needs ROUNDS (1 or 2), FACTORS (two rounds, of large orders), DECODER or ENCODER, ORDER, DTYPE, and what each file says.
#pragma once

#if ROUNDS == 1
#include "rotation_one_round.cuh"
#elif FACTORS
#include "rotation_in_factors.cuh"
#else
#include "rotation_two_rounds.cuh"
#endif
