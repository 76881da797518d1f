// Sixteen numbers at once, in the vector extensions that GCC and Clang share.
//
// Knows how numbers are stored; knows nothing of what they are.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = int32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};
// Weights whose products take bfloat16 inputs, where the CPU has these.
struct Bfloat16Product {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Floats load(const float *from) {
    Floats loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

inline Floats load(const Bfloat16 *from) {
    Shorts bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline Floats load(const Float16 *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__F16C__)
    const __m128i *halves = reinterpret_cast<const __m128i *>(from);
    const __m256 both[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    Floats loaded;
    std::memcpy(&loaded, both, sizeof loaded);
    return loaded;
#else
    // The exponents of subnormal halves come out by the product.
    Shorts bits;
    std::memcpy(&bits, from, sizeof bits);
    const Words words = __builtin_convertvector(bits, Words);
    const Words magnitude = (words & 0x7fff) << 13;
    const Words sign = (words & 0x8000) << 16;
    const Floats scaled = (Floats)magnitude * 0x1p112f;
    return (Floats)((Words)scaled | sign);
#endif
}

inline void store(float *to, Floats values) { std::memcpy(to, &values, sizeof values); }

// To the nearest, ties to even.
inline void store(Bfloat16 *to, Floats values) {
#if defined(__AVX512BF16__)
    const __m256bh kept = _mm512_cvtneps_pbh((__m512)values);
#else
    const Words bits = (Words)values;
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Shorts kept = __builtin_convertvector((rounded >> 16) & 0xffff, Shorts);
#endif
    std::memcpy(to, &kept, sizeof kept);
}

inline float sum(Floats values) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += values[lane];
    return total;
}

inline float highest(Floats values) {
    float best = values[0];
    for (int lane = 1; lane < LANES; lane++) best = values[lane] > best ? values[lane] : best;
    return best;
}

constexpr Words LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lanes of two vectors, those of the second counted from 16 on.
inline Floats picked(Floats one, Floats other, Words lanes) {
#if defined(__clang__)
    Floats chosen;
    for (int lane = 0; lane < LANES; lane++) chosen[lane] = lanes[lane] < LANES ? one[lanes[lane]] : other[lanes[lane] - LANES];
    return chosen;
#else
    return __builtin_shuffle(one, other, lanes);
#endif
}

// Where `DISTANCE` is not in a lane's number, the sum of two lanes of `one` that are so far apart, else of `other`.
template <int DISTANCE> inline Floats sum_apart(Floats one, Floats other) {
    const Words is_other = (LANE & DISTANCE) != 0;
    const Words low = is_other ? LANES + (LANE ^ DISTANCE) : LANE;
    const Words high = is_other ? LANES + LANE : LANE ^ DISTANCE;
    return picked(one, other, low) + picked(one, other, high);
}

// The sum of each of 16 vectors, in its own lane: halves are added to halves until one is left.
inline Floats sum_each(Floats *vectors) {
    for (int index = 0; index < 8; index++) vectors[index] = sum_apart<8>(vectors[index], vectors[index + 8]);
    for (int index = 0; index < 4; index++) vectors[index] = sum_apart<4>(vectors[index], vectors[index + 4]);
    for (int index = 0; index < 2; index++) vectors[index] = sum_apart<2>(vectors[index], vectors[index + 2]);
    return sum_apart<1>(vectors[0], vectors[1]);
}

// e to the power of x, to about one unit in the last place; what would overflow or vanish is clamped.
inline Floats exponential(Floats x) {
    const Floats least = Floats{} - 87.0f, most = Floats{} + 88.0f;
    x = x < least ? least : x;
    x = x > most ? most : x;
    const Floats shift = Floats{} + 0x1.8p23f;
    const Floats shifted = x * 1.44269504f + shift;
    const Floats whole = shifted - shift;
    const Floats rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Floats power = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const Words exponent = ((Words)shifted - (Words)shift) << 23;
    return (Floats)((Words)power + exponent);
}

} // namespace
