// NEON of every 64-bit ARM: bytes are multiplied into 16-bit sums, which are widened before they can overflow.
#include "edge-isa-neon.h"

namespace {

struct Neon : NeonBase {
    static constexpr int max_columns = 4;

    template <int max> struct Dot {
        static constexpr int largest = max == kSigned ? 128 : max;
        static constexpr int fit     = 32767 / (127 * largest); // products that surely fit 16 bits
        static constexpr int adds    = fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
        static_assert(fit >= 2, "the last group of a sub-block must widen");

        // of two rows each: 4 products a row, and 2 sums a row
        int16x8_t part[4];
        int32x4_t total[4];
        int8x16_t activations;

        EDGE_INLINE void start(int32_t offset) {
            // in one of a row's two sums
            const int32x4_t once = vsetq_lane_s32(offset, vsetq_lane_s32(offset, vdupq_n_s32(0), 0), 2);
            unroll<4>(EDGE_EACH(i) { total[i] = once; });
        }
        template <int g> EDGE_INLINE void add(I w, const int8_t * a) {
            if constexpr (g % 4 == 0) {
                activations = vld1q_s8(a);
            }
            const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(activations), g % 4));
            const int8x16_t low = signed_of(w.low), high = signed_of(w.high);
            if constexpr (g % adds == 0) {
                part[0] = vmull_s8(vget_low_s8(low), vget_low_s8(four));
                part[1] = vmull_high_s8(low, four);
                part[2] = vmull_s8(vget_low_s8(high), vget_low_s8(four));
                part[3] = vmull_high_s8(high, four);
            } else {
                part[0] = vmlal_s8(part[0], vget_low_s8(low), vget_low_s8(four));
                part[1] = vmlal_high_s8(part[1], low, four);
                part[2] = vmlal_s8(part[2], vget_low_s8(high), vget_low_s8(four));
                part[3] = vmlal_high_s8(part[3], high, four);
            }
            if constexpr (g % adds == adds - 1) {
                unroll<4>(EDGE_EACH(i) { total[i] = vpadalq_s16(total[i], part[i]); });
            }
        }
        EDGE_INLINE I sum() const { return { vpaddq_s32(total[0], total[1]), vpaddq_s32(total[2], total[3]) }; }
    };
    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        dot<Neon, T, n, s>(lanes, columns, sums);
    }
};

bool runs_here() { return true; }

} // namespace

extern const EdgeIsa edge_isa_neon;
const EdgeIsa edge_isa_neon = isa<Neon>("neon", runs_here);
