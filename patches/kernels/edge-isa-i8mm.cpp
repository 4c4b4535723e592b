// NEON with the product of byte matrices: 2 rows × 8 weights by 8 weights × 2 columns.
#include "edge-isa-neon.h"

namespace {

struct I8mm : NeonBase {
    static constexpr int max_columns = 8;

    template <int> using Dot = NeonDot;

    // two columns of 8 rows: [row 2i: column 0, 1; row 2i + 1: column 0, 1]
    struct Pair {
        int32x4_t total[4];

        EDGE_INLINE void start(int32_t first, int32_t second) {
            const int32x2_t two = vset_lane_s32(second, vdup_n_s32(first), 1);
            unroll<4>(EDGE_EACH(i) { total[i] = vcombine_s32(two, two); });
        }
        EDGE_INLINE void add(const int8x16_t * rows, int64x2_t columns) {
            unroll<4>(EDGE_EACH(i) { total[i] = vmmlaq_s32(total[i], rows[i], vreinterpretq_s8_s64(columns)); });
        }
        EDGE_INLINE I first() const { return { vuzp1q_s32(total[0], total[1]), vuzp1q_s32(total[2], total[3]) }; }
        EDGE_INLINE I second() const { return { vuzp2q_s32(total[0], total[1]), vuzp2q_s32(total[2], total[3]) }; }
    };

    // 8 weights of each row, two rows in a register, from two groups of 4 weights
    static EDGE_INLINE void zip(I even, I odd, int8x16_t * rows) {
        rows[0] = signed_of(vzip1q_s32(even.low, odd.low));
        rows[1] = signed_of(vzip2q_s32(even.low, odd.low));
        rows[2] = signed_of(vzip1q_s32(even.high, odd.high));
        rows[3] = signed_of(vzip2q_s32(even.high, odd.high));
    }
    static EDGE_INLINE int64x2_t sixteen(const int8_t * a) { return vreinterpretq_s64_s8(vld1q_s8(a)); }

    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        if constexpr (n < 5) { // the zips cost what the products save
            dot<I8mm, T, n, s>(lanes, columns, sums);
        } else {
            constexpr int last = n - 1; // one without a partner, where n is odd
            Pair    pairs[n / 2];
            NeonDot alone;
            unroll<n / 2>(EDGE_EACH(p) { pairs[p].start(columns.offset(2 * p, s), columns.offset(2 * p + 1, s)); });
            alone.start(columns.offset(last, s));
            unroll<T::groups / 4>(EDGE_EACH(i) {
                constexpr int g = i * 4, at = (s * T::groups + g) * 4;
                const I w[4] = { T::template weights<I8mm, s, g>(lanes), T::template weights<I8mm, s, g + 1>(lanes),
                                 T::template weights<I8mm, s, g + 2>(lanes), T::template weights<I8mm, s, g + 3>(lanes) };
                int8x16_t near[4], far[4];
                zip(w[0], w[1], near);
                zip(w[2], w[3], far);
                unroll<n / 2>(EDGE_EACH(p) {
                    const int64x2_t a = sixteen(columns.quants(2 * p) + at), b = sixteen(columns.quants(2 * p + 1) + at);
                    pairs[p].add(near, vzip1q_s64(a, b));
                    pairs[p].add(far, vzip2q_s64(a, b));
                });
                if constexpr (n % 2) {
                    unroll<4>(EDGE_EACH(j) { alone.template add<j>(w[j], columns.quants(last) + at); });
                }
            });
            unroll<n / 2>(EDGE_EACH(p) {
                sums[2 * p]     = pairs[p].first();
                sums[2 * p + 1] = pairs[p].second();
            });
            if constexpr (n % 2) {
                sums[last] = alone.sum();
            }
        }
    }
};

bool runs_here() { return has_dotprod() && has_i8mm(); }

} // namespace

extern const EdgeIsa edge_isa_i8mm;
const EdgeIsa edge_isa_i8mm = isa<I8mm>("neon-i8mm", runs_here);
