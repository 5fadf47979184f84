// Products of one strip of a row, and what follows them, as plain loops (formulas in packed_conv2d.h).

namespace lorun::packed_conv2d::LORUN_VARIANT {

// sums (blocks, pixels, 16) of `pixels` results that begin `offset` values into the rows.
template <class T>
LORUN_TARGET void multiply(const Filter<T>& f, const T* const* rows, int64_t offset, int64_t pixels, int64_t block,
                           int64_t blocks, Wide<T>* sums) {
  const int64_t steps = f.steps(), pitch = f.stride * f.in, values = f.block_values();
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t p = 0; p < pixels; ++p) {
      Wide<T> sum[kChannels] = {};
      for (int64_t row = 0; row < f.kernel; ++row) {
        const T* x = rows[row] + offset + p * pitch;
        const T* w = f.w + (block + b) * values + row * steps * kTileValues;
        for (int64_t i = 0; i < f.kernel * f.in; ++i) {
          const Wide<T> v = widen(x[i]);
          const T* pair = w + i / 2 * (2 * kChannels) + i % 2;
          for (int64_t c = 0; c < kChannels; ++c) {
            sum[c] += v * widen(pair[2 * c]);
          }
        }
      }
      std::copy_n(sum, kChannels, sums + (b * pixels + p) * kChannels);
    }
  }
}

template <class T>
LORUN_TARGET void finish(const Wide<T>* sums, int64_t pixels, const Finish<T>& to) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < to.channels; ++c) {
      const int64_t at = p * to.pitch + c;
      Wide<T> v = sums[(c / kChannels * pixels + p) * kChannels + c % kChannels];
      v += to.bias != nullptr ? to.bias[c] : 0;
      v = to.relu && v < 0 ? 0 : v;  // NaN passes
      v = to.gate != nullptr && widen(to.gate[at]) <= 0 ? 0 : v;
      v += to.added.first != nullptr ? widen(to.added.first[at]) : 0;
      v += to.added.second != nullptr ? widen(to.added.second[at]) : 0;
      to.y[at] = narrow<T>(v);
    }
  }
}

}  // namespace lorun::packed_conv2d::LORUN_VARIANT
