// Weights of errors, and the bytes of super-blocks (irc/core/formats/gguf_k.py shows their layout).
namespace {

// ------------------------------------------------------------------ weights of errors

// sqrt(factor * mean square of the block + x^2) * importance, for the block's groups from lane `lane` on.
template <int N>
void weigh(const float* block, const float* importance, float factor, int lane, Table<N>& w) {
    float total = 0.0f;
    for (int i = 0; i < BLOCK; ++i) total += block[i] * block[i];
    const float spread = factor * total / BLOCK;
    for (int i = 0; i < BLOCK; ++i)
        w[i % N][lane + i / N] = importance[i] * std::sqrt(spread + block[i] * block[i]);
}

template <int N>
void sum_weights(const Table<N>& w, Lanes& sums) {
    f32x16 total = load(w[0]);
    for (int i = 1; i < N; ++i) total = add(total, load(w[i]));
    store(sums, total);
}

void put_half(uint8_t* out, float value) {
    const f16 half = scalar::to_f16(value);
    std::memcpy(out, &half, 2);
}

float as_half(float value) { return to_float(scalar::to_f16(value)); }

// `bits` of 256 codes from bit `from` on: for each `width` bytes, the lowest bits first.
void put_planes(uint8_t* out, const uint8_t* codes, int width, int bits, int from = 0) {
    const int planes = 8 / bits, mask = (1 << bits) - 1;
    for (int start = 0; start < BLOCK; start += planes * width, out += width)
        for (int i = 0; i < width; ++i) {
            int byte = 0;
            for (int plane = 0; plane < planes; ++plane)
                byte |= (codes[start + plane * width + i] >> from & mask) << (plane * bits);
            out[i] = static_cast<uint8_t>(byte);
        }
}

struct WithMinima {
    uint8_t scales[LANES], minima[LANES];
    float d, dmin;
};

void pack_q2(const WithMinima& b, const uint8_t* codes, uint8_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(b.scales[i] | b.minima[i] << 4);
    put_planes(out + 16, codes, 32, 2);
    put_half(out + 80, b.d);
    put_half(out + 82, b.dmin);
}

void pack_head(const WithMinima& b, uint8_t* out) {
    put_half(out, b.d);
    put_half(out + 2, b.dmin);
    for (int i = 0; i < 4; ++i) {
        out[4 + i] = static_cast<uint8_t>(b.scales[i] | b.scales[i + 4] >> 4 << 6);
        out[8 + i] = static_cast<uint8_t>(b.minima[i] | b.minima[i + 4] >> 4 << 6);
        out[12 + i] = static_cast<uint8_t>((b.scales[i + 4] & 15) | (b.minima[i + 4] & 15) << 4);
    }
}

void pack_q4(const WithMinima& b, const uint8_t* codes, uint8_t* out) {
    pack_head(b, out);
    put_planes(out + 16, codes, 32, 4);
}

void pack_q5(const WithMinima& b, const uint8_t* codes, uint8_t* out) {
    pack_head(b, out);
    put_planes(out + 16, codes, 32, 1, 4);
    put_planes(out + 48, codes, 32, 4);
}

void pack_q3(const uint8_t* scales, float d, const uint8_t* codes, uint8_t* out) {
    put_planes(out, codes, 32, 1, 2);
    put_planes(out + 32, codes, 32, 2);
    for (int i = 0; i < 8; ++i) out[96 + i] = static_cast<uint8_t>((scales[i] & 15) | (scales[i + 8] & 15) << 4);
    for (int i = 0; i < 4; ++i)
        out[104 + i] = static_cast<uint8_t>(scales[i] >> 4 | scales[i + 4] >> 4 << 2 | scales[i + 8] >> 4 << 4 |
                                            scales[i + 12] >> 4 << 6);
    put_half(out + 108, d);
}

void pack_q6(const uint8_t* scales, float d, const uint8_t* codes, uint8_t* out) {
    put_planes(out, codes, 64, 4);
    put_planes(out + 128, codes, 32, 2, 4);
    std::memcpy(out + 192, scales, 16);
    put_half(out + 208, d);
}

}  // namespace
