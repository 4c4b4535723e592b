// What the three kinds of NEON share: 8 rows in two registers. They differ in how bytes are multiplied.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC would load a whole block's weights before it multiplies any, and spill most of them
#pragma GCC optimize("no-schedule-insns")
#endif

#include "edge-isa.h"

#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct NeonBase {
    struct I { int32x4_t low, high; };   // of rows 0 … 3 and 4 … 7
    struct F { float32x4_t low, high; };
    static constexpr int  rows = 8, lane_bytes = 32;
    static constexpr bool signed_bytes = true;

    static EDGE_INLINE uint8x16_t bytes(int32x4_t v) { return vreinterpretq_u8_s32(v); }
    static EDGE_INLINE int8x16_t  signed_of(int32x4_t v) { return vreinterpretq_s8_s32(v); }
    static EDGE_INLINE int16x8_t  shorts(int32x4_t v) { return vreinterpretq_s16_s32(v); }

    static EDGE_INLINE int32x4_t load_half(const uint8_t * at) { return vreinterpretq_s32_u8(vld1q_u8(at)); }
    static EDGE_INLINE I zero() { return { vdupq_n_s32(0), vdupq_n_s32(0) }; }
    static EDGE_INLINE I load(const uint8_t * at) { return { load_half(at), load_half(at + 16) }; }

    template <int shift, int mask> static EDGE_INLINE int32x4_t bits_of(int32x4_t v) {
        uint8x16_t found = bytes(v);
        if constexpr (shift > 0) {
            found = vshrq_n_u8(found, shift);
        }
        if constexpr (255 >> shift != mask) { // a shift of bytes has cleared the rest
            found = vandq_u8(found, vdupq_n_u8(mask));
        }
        return vreinterpretq_s32_u8(found);
    }
    template <int shift, int mask> static EDGE_INLINE I bits(I v) {
        return { bits_of<shift, mask>(v.low), bits_of<shift, mask>(v.high) };
    }
    template <int by> static EDGE_INLINE I left(I v) {
        return { vreinterpretq_s32_u8(vshlq_n_u8(bytes(v.low), by)), vreinterpretq_s32_u8(vshlq_n_u8(bytes(v.high), by)) };
    }
    static EDGE_INLINE I either(I a, I b) { return { vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high) }; }

    template <int i, bool is_signed> static EDGE_INLINE int32x4_t byte_of(int32x4_t v) {
        if constexpr (i < 3) {
            v = vshlq_n_s32(v, 24 - 8 * i);
        }
        return is_signed ? vshrq_n_s32(v, 24) : vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), 24));
    }
    template <int i, bool is_signed> static EDGE_INLINE I byte(I v) {
        return { byte_of<i, is_signed>(v.low), byte_of<i, is_signed>(v.high) };
    }
    template <int odd> static EDGE_INLINE int32x4_t pairs_of(int32x4_t v) {
        const uint16x8_t both = vreinterpretq_u16_s32(v);
        return vreinterpretq_s32_u16(odd ? vshrq_n_u16(both, 8) : vandq_u16(both, vdupq_n_u16(255)));
    }
    template <int odd> static EDGE_INLINE I pairs(I v) { return { pairs_of<odd>(v.low), pairs_of<odd>(v.high) }; }
    static EDGE_INLINE int32x4_t dot_pairs_of(int32x4_t sum, int16x8_t pair, int16x8_t a) {
        const int32x4_t first = vmull_s16(vget_low_s16(pair), vget_low_s16(a)), last = vmull_high_s16(pair, a);
        return vaddq_s32(sum, vpaddq_s32(first, last));
    }
    static EDGE_INLINE I dot_pairs(I sum, I pair, const uint8_t * a) {
        const int16x8_t two = shorts(vdupq_n_s32(int32_t(word(a, 0))));
        return { dot_pairs_of(sum.low, shorts(pair.low), two), dot_pairs_of(sum.high, shorts(pair.high), two) };
    }
    static EDGE_INLINE I multiply(I a, I b) { return { vmulq_s32(a.low, b.low), vmulq_s32(a.high, b.high) }; }
    static EDGE_INLINE I add(I a, I b) { return { vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high) }; }

    static EDGE_INLINE F halves(const uint8_t * at) {
        const float16x8_t eight = vreinterpretq_f16_u8(vld1q_u8(at));
        return { vcvt_f32_f16(vget_low_f16(eight)), vcvt_high_f32_f16(eight) };
    }
    static EDGE_INLINE F     floats(const float * at) { return { vld1q_f32(at), vld1q_f32(at + 4) }; }
    static EDGE_INLINE float total(F v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
    static EDGE_INLINE F broadcast(float v) { return { vdupq_n_f32(v), vdupq_n_f32(v) }; }
    static EDGE_INLINE F to_float(I v) { return { vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high) }; }
    static EDGE_INLINE F scale(F a, F b) { return { vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high) }; }
    static EDGE_INLINE F fma(F a, F b, F c) { return { vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high) }; }
    static EDGE_INLINE void store(float * at, F v) {
        vst1q_f32(at, v.low);
        vst1q_f32(at + 4, v.high);
    }
};

#ifdef __ARM_FEATURE_DOTPROD
// Σ of 4 signed bytes × 4 activations, which are taken from a register of 16
struct NeonDot {
    NeonBase::I total;
    int8x16_t   activations;

    EDGE_INLINE void start(int32_t offset) { total = { vdupq_n_s32(offset), vdupq_n_s32(offset) }; }
    template <int g> EDGE_INLINE void add(NeonBase::I w, const int8_t * a) {
        if constexpr (g % 4 == 0) {
            activations = vld1q_s8(a);
        }
        total.low  = vdotq_laneq_s32(total.low, NeonBase::signed_of(w.low), activations, g % 4);
        total.high = vdotq_laneq_s32(total.high, NeonBase::signed_of(w.high), activations, g % 4);
    }
    EDGE_INLINE NeonBase::I sum() const { return total; }
};
#endif

#if defined(__linux__)
// Linux's numbers, which older headers do not name
constexpr unsigned long kHwcapDotprod = 1ul << 20, kHwcap2I8mm = 1ul << 13;

inline bool has_dotprod() { return getauxval(AT_HWCAP) & kHwcapDotprod; }
inline bool has_i8mm() { return getauxval(AT_HWCAP2) & kHwcap2I8mm; }
#elif defined(__APPLE__)
inline bool has_feature(const char * name) {
    int    found = 0;
    size_t size  = sizeof(found);
    return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found;
}
inline bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dotprod() { return false; }
inline bool has_i8mm() { return false; }
#endif

} // namespace
