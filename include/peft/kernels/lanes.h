// Lanes: float32, bfloat16 and float16 in memory as vectors of float32.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "peft/kernels/cpu.h"

namespace peft::internal {

inline bool is_half(c10::ScalarType type) {
  return type == c10::ScalarType::BFloat16 || type == c10::ScalarType::Half;
}

#if PEFT_HAS_AVX
// `load` widens, `store` rounds to nearest, ties to even, as LibTorch's own conversions do; `keep` copies the
// chosen elements and writes 0 in place of the others, without a conversion.

#define PEFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
/// Sixteen elements, those outside `lanes` neither read nor written. In maskz forms where the plain ones make
/// GCC 12 warn of its own header.
struct Lanes512 {
  static constexpr __mmask16 all = 0xffff;

  static PEFT_TARGET __m512 load(const float* from, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, from);
  }
  static PEFT_TARGET __m512 load(const c10::BFloat16* from, __mmask16 lanes) {
    const __m512i bits = _mm512_maskz_cvtepu16_epi32(all, _mm256_maskz_loadu_epi16(lanes, from));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, bits, 16));
  }
  static PEFT_TARGET __m512 load(const c10::Half* from, __mmask16 lanes) {
    return _mm512_maskz_cvtph_ps(all, _mm256_maskz_loadu_epi16(lanes, from));
  }

  static PEFT_TARGET void store(float* to, __mmask16 lanes, __m512 values) {
    _mm512_mask_storeu_ps(to, lanes, values);
  }
  static PEFT_TARGET void store(c10::BFloat16* to, __mmask16 lanes, __m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(all, bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i rounded =
        _mm512_mask_mov_epi32(_mm512_maskz_srli_epi32(all, sum, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_maskz_cvtepi32_epi16(all, rounded));
  }
  static PEFT_TARGET void store(c10::Half* to, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(
        to, lanes, _mm512_maskz_cvtps_ph(all, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static PEFT_TARGET void keep(const float* from, __mmask16 kept, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(kept, from));
  }
  /// Of either half type.
  static PEFT_TARGET void keep(const void* from, __mmask16 kept, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(kept, from));
  }
};
#undef PEFT_TARGET

// Whatever has AVX2 has F16C; LibTorch's own kernels rely on it too.
#define PEFT_TARGET __attribute__((target("avx2,fma,f16c")))
/// Eight elements.
struct Lanes256 {
  static PEFT_TARGET __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static PEFT_TARGET __m256 load(const c10::BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(from)), 16));
  }
  static PEFT_TARGET __m256 load(const c10::Half* from) { return _mm256_cvtph_ps(bits(from)); }

  static PEFT_TARGET void store(float* to, __m256 values) { _mm256_storeu_ps(to, values); }
  static PEFT_TARGET void store(c10::BFloat16* to, __m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  static PEFT_TARGET void store(c10::Half* to, __m256 values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }

  /// `kept`: all ones or 0 of each element.
  static PEFT_TARGET void keep(const float* from, __m256i kept, float* to) {
    _mm256_storeu_ps(to, _mm256_and_ps(_mm256_loadu_ps(from), _mm256_castsi256_ps(kept)));
  }
  /// Of either half type.
  static PEFT_TARGET void keep(const void* from, __m256i kept, void* to) {
    const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm_and_si128(bits(from), mask));
  }

 private:
  static PEFT_TARGET __m128i bits(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
};
#undef PEFT_TARGET

#endif

}  // namespace peft::internal
