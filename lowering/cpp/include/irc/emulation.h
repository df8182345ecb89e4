// AVX-512 intrinsics that SIMDe 0.7.4 lacks, made of its 256-bit halves. Only for IRC_EMULATE_AVX512 (see isa.h).
#pragma once

namespace irc_emulation {

inline simde__m512i join(simde__m256i low, simde__m256i high) {
    return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}
inline simde__m512 join(simde__m256 low, simde__m256 high) {
    return simde_mm512_castsi512_ps(join(simde_mm256_castps_si256(low), simde_mm256_castps_si256(high)));
}
inline simde__m256i half(simde__m512i x, int which) {
    return which ? simde_mm512_extracti64x4_epi64(x, 1) : simde_mm512_castsi512_si256(x);
}
inline simde__m256 half(simde__m512 x, int which) {
    return simde_mm256_castsi256_ps(half(simde_mm512_castps_si512(x), which));
}
inline simde__m512i widen_u16(simde__m256i x) {
    return join(simde_mm256_cvtepu16_epi32(simde_mm256_castsi256_si128(x)),
                simde_mm256_cvtepu16_epi32(simde_mm256_extracti128_si256(x, 1)));
}
inline simde__m512i widen_u8(simde__m128i x) {
    return join(simde_mm256_cvtepu8_epi32(x), simde_mm256_cvtepu8_epi32(simde_mm_srli_si128(x, 8)));
}
inline simde__m512i widen_i8(simde__m128i x) {
    return join(simde_mm256_cvtepi8_epi32(x), simde_mm256_cvtepi8_epi32(simde_mm_srli_si128(x, 8)));
}
inline simde__m512 from_half(simde__m256i x) {
    return join(simde_mm256_cvtph_ps(simde_mm256_castsi256_si128(x)),
                simde_mm256_cvtph_ps(simde_mm256_extracti128_si256(x, 1)));
}
inline simde__m512 to_float(simde__m512i x) {
    return join(simde_mm256_cvtepi32_ps(half(x, 0)), simde_mm256_cvtepi32_ps(half(x, 1)));
}
inline simde__m512i to_int(simde__m512 x) {
    return join(simde_mm256_cvtps_epi32(half(x, 0)), simde_mm256_cvtps_epi32(half(x, 1)));
}
inline simde__m128i narrow_i32(simde__m512i x) {
    alignas(64) int wide[16];
    alignas(16) signed char low[16];
    simde_mm512_store_si512(wide, x);
    for (int i = 0; i < 16; ++i) low[i] = static_cast<signed char>(wide[i]);
    return simde_mm_load_si128(reinterpret_cast<const simde__m128i*>(low));
}

}  // namespace irc_emulation

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepu16_epi32 irc_emulation::widen_u16
#define _mm512_cvtepu8_epi32 irc_emulation::widen_u8
#define _mm512_cvtepi8_epi32 irc_emulation::widen_i8
#define _mm512_cvtph_ps irc_emulation::from_half
#define _mm512_cvtepi32_ps irc_emulation::to_float
#define _mm512_cvtps_epi32 irc_emulation::to_int
#define _mm512_cvtepi32_epi8 irc_emulation::narrow_i32
