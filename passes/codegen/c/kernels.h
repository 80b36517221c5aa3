/* What the functions of a step call. Entry by entry, without branches, so that loops over them become vector code. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif

/* A vector that several products take: without this, compilers load it anew for each. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__GNUC__) && defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#elif defined(__GNUC__) && defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define IN_REGISTER(v) (void)0
#endif

INLINE float float_of_bits(int32_t i) { float x; memcpy(&x, &i, sizeof x); return x; }

/* NaN goes through all of these, as in PyTorch. */
INLINE float relu_f(float x) { return 0.0f > x ? 0.0f : x; }
INLINE double relu_d(double x) { return 0.0 > x ? 0.0 : x; }
INLINE float max_f(float a, float b) { return a != a ? a : (a > b ? a : b); }
INLINE double max_d(double a, double b) { return a != a ? a : (a > b ? a : b); }
INLINE float min_f(float a, float b) { return a != a ? a : (a < b ? a : b); }
INLINE double min_d(double a, double b) { return a != a ? a : (a < b ? a : b); }
INLINE float sign_f(float x) { return (float)((x > 0) - (x < 0)); }
INLINE double sign_d(double x) { return (double)((x > 0) - (x < 0)); }

/* The result has the sign of the divisor, as in Python. */
INLINE float remainder_f(float a, float b) { float r = fmodf(a, b); return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
INLINE double remainder_d(double a, double b) { double r = fmod(a, b); return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
INLINE int64_t remainder_i(int64_t a, int64_t b) { int64_t r = a % b; return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
INLINE int64_t floor_div_i(int64_t a, int64_t b) { int64_t q = a / b; return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q; }

/* e^y = 2^n e^r, |r| <= log(2) / 2: n, and e^r. */
INLINE float exp_factor(float y, float *whole)
{
    float n = rintf(y * 1.44269504f);
    *whole = n;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.000198992871446535f;
    p = p * r + 0.0013933652080595493f;
    p = p * r + 0.0083332983776927f;
    p = p * r + 0.04166646674275398f;
    p = p * r + 0.1666666716337204f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p;
}

/* 2^n in two factors, so that results below the least normal number come out too. */
INLINE float exp_f(float x)
{
    float y = x < 89.0f ? x : 89.0f; /* so written one instruction; NaN comes back in the end */
    y = y > -105.0f ? y : -105.0f;
    float n, p = exp_factor(y, &n);
    int32_t k = (int32_t)n, half = k / 2;
    float z = p * float_of_bits((half + 127) * (1 << 23)) * float_of_bits((k - half + 127) * (1 << 23));
    return x != x ? x : z;
}
INLINE double exp_d(double x) { return exp(x); }

/* 1 / (1 + e^-x), where e^-x is a normal number or 0: what is left out is below 1e-38. */
INLINE float sigmoid_f(float x)
{
    float y = -x < 88.0f ? -x : 88.0f;
    y = y > -88.0f ? y : -88.0f;
    float n, p = exp_factor(y, &n);
    float s = 1.0f / (1.0f + p * float_of_bits(((int32_t)n + 127) * (1 << 23)));
    return x != x ? x : s;
}
INLINE double sigmoid_d(double x) { return 1.0 / (1.0 + exp(-x)); }

/* tanh x = x + x^3 P(x^2) near 0, else 1 - 2 / (e^2x + 1). */
INLINE float tanh_f(float x)
{
    float a = fabsf(x), s = x * x;
    float p = 0.0022958347108215094f;
    p = p * s - 0.008346972987055779f;
    p = p * s + 0.02176995761692524f;
    p = p * s - 0.05395940691232681f;
    p = p * s + 0.13333304226398468f;
    p = p * s - 0.3333333432674408f;
    float far = copysignf(1.0f - 2.0f / (exp_f(2.0f * a) + 1.0f), x);
    return a < 0.625f ? x + x * s * p : far;
}
INLINE double tanh_d(double x) { return tanh(x); }

/* erf x = x P(x^2) near 0, else 1 - e^Q(|x|), where Q approximates log(1 - erf) up to 4. */
INLINE float erf_f(float x)
{
    float a = fabsf(x), s = x * x;
    float p = 7.882497448008507e-05f;
    p = p * s - 0.0008018855005502701f;
    p = p * s + 0.005189312156289816f;
    p = p * s - 0.02685432881116867f;
    p = p * s + 0.11283597350120544f;
    p = p * s - 0.3761262595653534f;
    p = p * s + 1.1283791065216064f;
    float b = a > 4.0f ? 4.0f : a;
    float q = -1.3309389942151029e-05f;
    q = q * b + 0.0003175720339640975f;
    q = q * b - 0.0034368676133453846f;
    q = q * b + 0.022621985524892807f;
    q = q * b - 0.10331898182630539f;
    q = q * b - 0.6390933394432068f;
    q = q * b - 1.125925898551941f;
    q = q * b - 0.0007569686276838183f;
    float far = copysignf(1.0f - exp_f(q), x);
    return a < 1.0f ? x * p : far;
}
INLINE double erf_d(double x) { return erf(x); }

/* Memory that is read soon, brought nearer while there is something to compute. */
typedef struct { const void *at; long bytes; } Range;
typedef struct { const Range *range; int ranges; const char *at, *end; } Ahead;
INLINE void fetch(Ahead *a, int lines)
{
    for (; lines > 0; lines--) {
        if (a->at >= a->end) {
            if (a->ranges <= 0) return;
            a->at = a->range->at;
            a->end = a->at + a->range->bytes;
            a->range++, a->ranges--;
        }
        __builtin_prefetch(a->at, 0, 2);
        a->at += 64;
    }
}
