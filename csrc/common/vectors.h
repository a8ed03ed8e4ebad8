// Which vectors the processor has and ATEN_CPU_CAPABILITY, which limits those of torch, allows.
#pragma once

namespace steepest {

// Sets of x86 instructions that code is compiled for, the wider ones last; elsewhere the baseline is all there is.
enum class Vectors { baseline, avx2, avx512 };

Vectors widest_vectors();

// Products of bf16 beside AVX-512.
bool has_bf16_vectors();

// Tiles for bf16 (AMX), for which a process asks its system; the limit "avx512" leaves them out.
bool has_bf16_tiles();

}  // namespace steepest
