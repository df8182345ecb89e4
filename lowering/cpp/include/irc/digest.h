// A keyed digest of bytes at the speed of memory: four NH sums of each block, each continued as a polynomial.
//
// NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO '99): of a block of words w with keys k,
//     sum of (lo(w_i) + lo(k_i) mod 2^32) (hi(w_i) + hi(k_i) mod 2^32) mod 2^64,
// where lo and hi are the halves of 64-bit words. Two blocks that do not depend on the key give equal sums with
// probability 2^-32 at most; four sums, each with the keys moved on by one word, with 2^-128 (the paper's theorem on
// Toeplitz keys). Sums of blocks are the coefficients of a polynomial over 2^61 - 1 at a point of the key's, for each of
// the four: n blocks add n / 2^61 to the probability of each.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace irc {

constexpr int kDigestWords = 512, kDigestSums = 4;                  // 4 KiB a block
constexpr int kDigestKeys = kDigestWords + 2 * kDigestSums;         // keys of a block, and the points

namespace digest_detail {

constexpr uint64_t kPrime = (uint64_t(1) << 61) - 1;

inline uint64_t multiply(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    const uint64_t sum = (static_cast<uint64_t>(product) & kPrime) + static_cast<uint64_t>(product >> 61);
    return sum >= kPrime ? sum - kPrime : sum;
}

inline void block_sums(const uint8_t* block, const uint64_t* keys, uint64_t* sums) {
#ifdef __AVX2__
    __m256i totals[kDigestSums] = {};
    for (int i = 0; i < kDigestWords; i += 4) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 8 * i));
        for (int s = 0; s < kDigestSums; ++s) {
            const __m256i both =
                _mm256_add_epi32(words, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i + s)));
            totals[s] = _mm256_add_epi64(totals[s], _mm256_mul_epu32(both, _mm256_srli_epi64(both, 32)));
        }
    }
    for (int s = 0; s < kDigestSums; ++s) {
        uint64_t lanes[4];
        std::memcpy(lanes, &totals[s], sizeof(lanes));
        sums[s] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
#else
    for (int s = 0; s < kDigestSums; ++s) sums[s] = 0;
    for (int i = 0; i < kDigestWords; ++i) {
        uint64_t w;
        std::memcpy(&w, block + 8 * i, 8);
        const uint32_t low = static_cast<uint32_t>(w), high = static_cast<uint32_t>(w >> 32);
        for (int s = 0; s < kDigestSums; ++s) {
            const uint64_t k = keys[i + s];
            sums[s] += uint64_t(low + uint32_t(k)) * (high + uint32_t(k >> 32));
        }
    }
#endif
}

}  // namespace digest_detail

// out[4] from `size` bytes and kDigestKeys keys. The last block is filled up with zeros; the size counts, too.
inline void digest(const uint8_t* data, int64_t size, const uint64_t* keys, uint64_t* out) {
    using namespace digest_detail;
    constexpr int64_t kBlock = 8 * kDigestWords;
    uint64_t sums[kDigestSums], points[kDigestSums];
    for (int s = 0; s < kDigestSums; ++s) {
        points[s] = keys[kDigestWords + kDigestSums + s] % kPrime;
        out[s] = static_cast<uint64_t>(size) % kPrime;
    }
    for (int64_t at = 0; at < size; at += kBlock) {
        if (size - at >= kBlock) {
            block_sums(data + at, keys, sums);
        } else {
            uint8_t last[kBlock] = {};
            std::memcpy(last, data + at, static_cast<size_t>(size - at));
            block_sums(last, keys, sums);
        }
        for (int s = 0; s < kDigestSums; ++s) {
            const uint64_t sum = multiply(out[s], points[s]) + sums[s] % kPrime;
            out[s] = sum >= kPrime ? sum - kPrime : sum;
        }
    }
}

}  // namespace irc
