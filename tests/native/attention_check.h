// Attention against softmax in double, and that a row depends on nothing but its own query, mask, keys and values.
#pragma once

#include "edge-matmul.h"
#include "kernel_reference.h"
#include "tools.h"

#include <vector>

namespace {

constexpr uint16_t kHidden = 0xfc00; // -infinity

// keys, values and masks have room for `n_room` keys, of which the rows see some of the first `n_keys`
struct AttentionCase {
    int    n_rows, dk, dv, n_keys, n_room;
    size_t key_stride, value_stride;
    bool   exact; // scores are small multiples of a power of two: only the softmax rounds
    float  scale;
    Buffer keys, values, masks, queries;

    AttentionCase(Random & random, int rows, int k, int v, int used, int room)
        : n_rows(rows), dk(k), dv(v), n_keys(used), n_room(room), key_stride(size_t(k) * 2 + 32), value_stride(size_t(v) * 2),
          exact(random.once_in(2)), scale(exact ? 0.125f : 1.0f / std::sqrt(float(k))), keys(int64_t(key_stride) * room),
          values(int64_t(value_stride) * room), masks(int64_t(rows) * room * 2), queries(int64_t(rows) * k * 4) {
        fill(random, keys, 4.0);
        fill(random, values, 2.0);
        for (size_t i = 0; exact && i + 1 < keys.bytes(); i += 2) {
            static const uint16_t some[] = { 0x0000, 0x3c00, 0xbc00, 0x4000 }; // 0, 1, -1, 2
            memcpy(keys.data() + i, &some[random.below(4)], 2);
        }
        for (int i = 0; i < rows * k; i++) {
            const float x = exact ? float(random.below(7) - 3) / 2 : float(random.below(4001) - 2000) / 500;
            memcpy(queries.data() + i * 4, &x, 4);
        }
        for (int r = 0; r < rows; r++) {
            // none, all but the first ones, some, or all are hidden; some of the others are only damped
            const int kind = random.below(8), limit = kind < 5 ? random.below(used) + 1 : used;
            for (int i = 0; i < room; i++) {
                const bool     hidden = i >= limit || kind == 7 || (kind == 6 && random.once_in(2));
                const uint16_t mask   = hidden ? kHidden : kind == 4 && random.once_in(4) ? uint16_t(0xc100) : uint16_t(0); // -2.5
                memcpy(masks.data() + (r * room + i) * 2, &mask, 2);
            }
        }
    }
    // halves of magnitude up to `largest`, a power of two
    static void fill(Random & random, Buffer & halves, double largest) {
        const int top = 15 + std::ilogb(largest);
        for (size_t i = 0; i + 1 < halves.bytes(); i += 2) {
            const uint16_t half = uint16_t(random.below(2) << 15 | random.below(top << 10));
            memcpy(halves.data() + i, &half, 2);
        }
    }
    uint16_t mask(int r, int i) { return read_as<uint16_t>(masks.data() + (r * n_room + i) * 2); }
};

// rows first … first + n - 1 in one call, over `n_keys` keys; (n, dv)
std::vector<float> attended(const EdgeIsa & isa, AttentionCase & c, int first, int n, int n_keys, bool with_mask) {
    EdgeAttention job{};
    job.n_rows       = n;
    job.dk           = c.dk;
    job.dv           = c.dv;
    job.n_keys       = n_keys;
    job.keys         = c.keys.data();
    job.values       = c.values.data();
    job.key_stride   = c.key_stride;
    job.value_stride = c.value_stride;
    job.scale        = c.scale;
    Buffer out(int64_t(n) * c.dv * 4), work(job.work_floats() * 4);
    memset(work.data(), 0xff, work.bytes()); // no number: nothing may be read before it is written
    for (int r = 0; r < n; r++) {
        job.query[r] = reinterpret_cast<const float *>(c.queries.data()) + (first + r) * c.dk;
        job.mask[r]  = with_mask ? reinterpret_cast<const uint16_t *>(c.masks.data()) + (first + r) * c.n_room : nullptr;
        job.out[r]   = reinterpret_cast<float *>(out.data()) + r * c.dv;
    }
    isa.attend(job, reinterpret_cast<float *>(work.data()));
    out.check("attend (results)");
    work.check("attend (work)");
    std::vector<float> found(size_t(n) * size_t(c.dv));
    memcpy(found.data(), out.data(), found.size() * 4);
    return found;
}

void same(const std::vector<float> & rows, int r, const std::vector<float> & row, const char * what) {
    if (memcmp(rows.data() + size_t(r) * row.size(), row.data(), row.size() * 4) != 0) {
        fail("row %d is another %s", r, what);
    }
}

void near_softmax(AttentionCase & c, int r, bool with_mask, const float * found) {
    std::vector<double> scores, sum(size_t(c.dv)), size(size_t(c.dv));
    double              top = -INFINITY, total = 0, error = 0;
    for (int i = 0; i < c.n_keys; i++) {
        double dot = 0, terms = 0;
        for (int d = 0; d < c.dk; d++) {
            const double term = double(read_as<float>(c.queries.data() + (r * c.dk + d) * 4)) *
                                half_value(c.keys.data() + size_t(i) * c.key_stride + size_t(d) * 2);
            dot += term;
            terms += std::fabs(term);
        }
        const bool hidden = with_mask && c.mask(r, i) == kHidden;
        scores.push_back(hidden ? -INFINITY : dot * double(c.scale) + (with_mask && c.mask(r, i) ? -2.5 : 0.0));
        top   = std::fmax(top, scores.back());
        // of a score: dk products and sums, one more rounding of it, and one where the largest is subtracted
        error = c.exact ? 0 : std::fmax(error, (c.dk + 4) * std::ldexp(terms * double(c.scale) + 2.5, -24));
    }
    for (int i = 0; i < c.n_keys && top > -INFINITY; i++) {
        const double w = std::exp(scores[size_t(i)] - top);
        total += w;
        for (int d = 0; d < c.dv; d++) {
            const double term = w * half_value(c.values.data() + size_t(i) * c.value_stride + size_t(d) * 2);
            sum[size_t(d)] += term;
            size[size_t(d)] += std::fabs(term);
        }
    }
    for (int d = 0; d < c.dv; d++) {
        const double right = total > 0 ? sum[size_t(d)] / total : 0, terms = total > 0 ? size[size_t(d)] / total : 0;
        // the errors of two scores (of the weight and of the total), 4e-7 of an exponential, and a sum over the keys
        const double allowed = terms * (4 * error + 4e-6 + (c.n_keys + 64) * std::ldexp(1, -23)) + 1e-30;
        if (!(std::fabs(double(found[d]) - right) <= allowed)) {
            fail("row %d of %d, %d keys, dk %d, dv %d, value %d: %.9g for %.17g, %g allowed", r, c.n_rows, c.n_keys, c.dk, c.dv, d,
                 double(found[d]), right, allowed);
        }
    }
}

void check_attention(const EdgeIsa & isa, Random & random) {
    const int  n_keys = 1 + random.below(100);
    const bool with_mask = !random.once_in(4);
    const int  n_rows = 1 + random.below(EdgeAttention::max_rows), dk = 16 * (1 + random.below(8)), dv = 16 * (1 + random.below(8));
    const int  n_room = n_keys + random.below(100);
    AttentionCase c(random, n_rows, dk, dv, n_keys, n_room);
    const auto rows = attended(isa, c, 0, c.n_rows, n_keys, with_mask);
    const auto wide = with_mask ? attended(isa, c, 0, c.n_rows, c.n_room, true) : rows;
    if (rows != wide) {
        fail("%d hidden keys behind %d change the result", c.n_room - n_keys, n_keys);
    }
    for (int r = 0; r < c.n_rows; r++) {
        near_softmax(c, r, with_mask, rows.data() + r * c.dv);
        same(rows, r, attended(isa, c, r, 1, n_keys, with_mask), "alone");
    }
}

} // namespace
