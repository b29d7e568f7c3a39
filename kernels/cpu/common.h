// Numbers, rounding and the exponential, for every set of instructions anew: see `kernels.cpp`.

inline float widen(float value) { return value; }
inline float widen(Bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, Bf16& to) {  // to the nearest, ties to even; a NaN stays one
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0);
}

template <typename T>
inline float rounded(float value) {
  T to;
  narrow(value, to);
  return widen(to);
}

// e^x, within an ulp or two where the result is a normal number, 0 below, infinity above 88.72; NaN stays NaN.
// x = n log 2 + r with |r| <= log(2) / 2, where e^r is a polynomial (Taylor's to the sixth power, its last terms
// adjusted) and 2^n goes into the exponent's bits. The sum with `kShift` rounds to a whole n in the lowest bits.
inline float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  const float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  const float shifted = clamped * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  std::uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  result = x < -87.33f ? 0.0f : result;
  return x > 88.72f ? std::numeric_limits<float>::infinity() : result;
}
