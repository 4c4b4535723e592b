// What the checks share: a message and the end, random numbers, memory that notices who writes beside it.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace {

std::string where; // what is tested now, for the message

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char * what, ...) {
    va_list values;
    va_start(values, what);
    printf("FAILED %s: ", where.c_str());
    vprintf(what, values);
    printf("\n");
    va_end(values);
    exit(1);
}

struct Random { // SplitMix64 (Steele, Lea and Flood 2014): the same numbers on every machine
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z          = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z          = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int  below(int n) { return int(next() % uint64_t(n)); }
    bool once_in(int n) { return below(n) == 0; }
};

// memory of exactly `size` bytes: what is written beside it shows in the guards, what is read beside it to a sanitizer
class Buffer {
#ifdef __SANITIZE_ADDRESS__
    static constexpr size_t guard = 0;
#else
    static constexpr size_t guard = 64;
#endif
    static constexpr uint8_t   pattern = 0xa5;
    size_t                     size;
    std::unique_ptr<uint8_t[]> all;

  public:
    explicit Buffer(int64_t bytes) : size(size_t(bytes)), all(new uint8_t[size + 2 * guard]) {
        memset(all.get(), pattern, size + 2 * guard);
    }
    uint8_t * data() { return all.get() + guard; }
    size_t    bytes() const { return size; }
    void      check(const char * what) const {
        for (size_t i = 0; i < guard; i++) {
            if (all[i] != pattern || all[guard + size + i] != pattern) {
                fail("%s wrote outside its memory of %zu bytes", what, size);
            }
        }
    }
};

} // namespace
