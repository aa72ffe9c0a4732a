// FlatStorage: trainable tensors and their gradients as views of few contiguous buffers.
#pragma once

#include <c10/util/DimVector.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

/// Lays tensors end to end, so that clearing, norm and update are one pass each. The tensors stay what they
/// were: own shape, own gradient, own version; whoever replaces one (`to(dtype)`, `load`, a foreign
/// `zero_grad`) only costs the next `gather` a copy.
///
/// Example:
/// ```
/// FlatStorage storage(adapter.parameters(), groups, /*columns=*/2);
/// storage.zero_gradients();
/// loss.backward();
/// const auto& defined = storage.gather();
/// ```
class FlatStorage {
 public:
  /// Tensors of one group, type and device.
  struct Segment {
    size_t group = 0;
    std::vector<size_t> members;  ///< indices of its tensors, in the order they lie
    Tensor values, gradients;     ///< flat
    std::vector<Tensor> columns;  ///< flat, for whoever keeps something for each weight; they move with it
  };
  /// Where a tensor lies.
  struct Place {
    size_t segment = 0;
    int64_t offset = 0, size = 0;
  };

  FlatStorage() = default;
  /// `groups[i]` is the group of `tensors[i]`. Tensors of a segment lie in the order given.
  FlatStorage(std::vector<Tensor> tensors, std::vector<size_t> groups, size_t columns)
      : tensors_(std::move(tensors)),
        groups_(std::move(groups)),
        columns_(columns),
        defined_(tensors_.size()) {
    TORCH_INTERNAL_ASSERT(groups_.size() == tensors_.size());
    arrange();
  }

  /// Further tensors, in segments of their own; those that are there stay where they are. `group`: one that
  /// no tensor has yet. Their gradients count as undefined until something is written to them.
  void append(const std::vector<Tensor>& tensors, size_t group) {
    torch::NoGradGuard no_grad;
    const auto first = tensors_.size();
    tensors_.insert(tensors_.end(), tensors.begin(), tensors.end());
    groups_.resize(tensors_.size(), group);
    defined_.resize(tensors_.size(), false);
    places_.resize(tensors_.size());
    slices_.resize(tensors_.size());
    lay_out(first, segments_, places_);
    for (size_t i = first; i < tensors_.size(); ++i) {
      move_in(i);
      slices_[i].mark = slices_[i].version();
    }
  }

  const std::vector<Segment>& segments() const { return segments_; }
  /// A tensor's part of a column, in its shape.
  Tensor column(size_t which, size_t index) const { return view(segment_of(index).columns[which], index); }

  /// Brings back what was replaced and says for each tensor whether it has a gradient: a slice that nothing
  /// was written to since `zero_gradients` counts as none. Throws: c10::Error if a tensor has changed its
  /// shape or its gradient is sparse; nothing is changed then.
  const std::vector<char>& gather() {
    if (in_place()) {
      for (size_t i = 0; i < tensors_.size(); ++i) defined_[i] = slices_[i].is_written();
      return defined_;
    }
    torch::NoGradGuard no_grad;
    gather_values();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& gradient = gradient_of(tensors_[i]);
      auto& slice = slices_[i].gradient;
      if (gradient.is_same(slice)) {
        defined_[i] = slices_[i].is_written();
      } else if (!gradient.defined()) {
        defined_[i] = false;
      } else {
        // The copy changes the slice's version, which marks it as written to.
        if (gradient.scalar_type() == slice.scalar_type() && gradient.data_ptr() == slice.data_ptr()) {
          torch::autograd::impl::bump_version(slice);
        } else {
          slice.copy_(gradient);
        }
        tensors_[i].mutable_grad() = slice;
        defined_[i] = true;
      }
    }
    return defined_;
  }

  /// Calls `work(segment, first tensor, begin, size)` for each longest stretch of tensors that `chosen` says
  /// yes to and whose `key(tensor)` is the same.
  template <class Key, class Work>
  void for_each_run(const std::vector<char>& chosen, const Key& key, const Work& work) const {
    for (const auto& segment : segments_) {
      const auto& members = segment.members;
      for (size_t i = 0; i < members.size();) {
        const size_t first = members[i];
        const auto like = key(first);
        const int64_t begin = places_[first].offset;
        int64_t end = begin;
        for (; i < members.size(); ++i) {
          const size_t next = members[i];
          if (chosen[next] != chosen[first] || !(key(next) == like)) break;
          end = places_[next].offset + places_[next].size;
        }
        if (chosen[first] && end > begin) work(segment, first, begin, end - begin);
      }
    }
  }

  /// What the last `gather` returned; tensors appended since are undefined.
  const std::vector<char>& defined() const { return defined_; }

  /// Clears all gradients. They stay allocated, but until something is written to one, `gather` calls it
  /// undefined.
  void zero_gradients() {
    torch::NoGradGuard no_grad;
    if (!in_place()) {
      gather_values();
      for (size_t i = 0; i < tensors_.size(); ++i) {
        const auto& gradient = slices_[i].gradient;
        if (!gradient_of(tensors_[i]).is_same(gradient)) tensors_[i].mutable_grad() = gradient;
      }
    }
    for (auto& slice : slices_) slice.mark = slice.version();
    for (auto& segment : segments_) segment.gradients.zero_();
  }

  /// Undefines the gradients that are allocated but untouched, for whoever looks at them next.
  void drop_untouched() {
    gather();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!defined_[i]) tensors_[i].mutable_grad() = Tensor();
    }
  }

  /// Tells autograd that the values of all tensors with a gradient are written to through their segments.
  void mark_written() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (defined_[i]) tensors_[i].unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  // What is looked at in every step lies here side by side: with many tensors their own memory is far apart.
  struct Slice {
    Tensor value, gradient;
    c10::DimVector sizes;
    void* address = nullptr;          ///< the value's
    c10::VariableVersion versions{};  ///< the gradient's
    int64_t mark = 0;                 ///< its version when it was cleared

    int64_t version() const { return static_cast<int64_t>(versions.current_version()); }
    bool is_written() const { return version() != mark; }
  };

  // Without the way through the dispatcher and the checks for leaves.
  static const Tensor& gradient_of(const Tensor& tensor) { return tensor.unsafeGetTensorImpl()->grad(); }

  bool has_value_in_place(size_t i) const {
    const Tensor& tensor = tensors_[i];
    const Slice& slice = slices_[i];
    return tensor.data_ptr() == slice.address && tensor.is_contiguous() &&
           tensor.sizes() == c10::IntArrayRef(slice.sizes);
  }
  /// True if nothing was replaced.
  bool in_place() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!gradient_of(tensors_[i]).is_same(slices_[i].gradient) || !has_value_in_place(i)) return false;
    }
    return true;
  }

  const Segment& segment_of(size_t index) const { return segments_[places_[index].segment]; }
  Tensor view(const Tensor& flat, size_t index) const {
    return flat.narrow(0, places_[index].offset, tensors_[index].numel()).view(tensors_[index].sizes());
  }

  void gather_values() {
    bool other_kind = false;
    std::vector<size_t> moved;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      const Slice& slice = slices_[i];
      if (!has_value_in_place(i)) moved.push_back(i);
      const Tensor& gradient = gradient_of(tensor);
      TORCH_CHECK(
          gradient.is_same(slice.gradient) || !gradient.defined() || !gradient.is_sparse(),
          "the optimizer does not support sparse gradients (hint: an nn::Embedding with sparse(false))");
    }
    for (const size_t i : moved) {
      const auto& was = slices_[i].value;
      TORCH_CHECK(tensors_[i].sizes() == was.sizes(), "the optimizer's tensor ", i, " must keep its shape ",
                  was.sizes(), ", but has become ", tensors_[i].sizes(), " (hint: make a new optimizer)");
      other_kind = other_kind || tensors_[i].scalar_type() != was.scalar_type() ||
                   tensors_[i].device() != was.device();
    }
    if (other_kind) return arrange();
    for (const size_t i : moved) {
      slices_[i].value.copy_(tensors_[i]);
      tensors_[i].set_data(slices_[i].value);
    }
  }

  /// Finds places in new segments for the tensors from `begin` on.
  void lay_out(size_t begin, std::vector<Segment>& segments, std::vector<Place>& places) const {
    const size_t old = segments.size();
    std::vector<int64_t> sizes;
    for (size_t i = begin; i < tensors_.size(); ++i) {
      const auto first = [&](const Segment& segment) { return tensors_[segment.members.front()]; };
      auto found = std::find_if(
          segments.begin() + static_cast<std::ptrdiff_t>(old), segments.end(), [&](const Segment& segment) {
            return segment.group == groups_[i] && first(segment).scalar_type() == tensors_[i].scalar_type() &&
                   first(segment).device() == tensors_[i].device();
          });
      const auto index = static_cast<size_t>(found - segments.begin());
      if (found == segments.end()) {
        segments.push_back({groups_[i], {}, {}, {}, {}});
        sizes.push_back(0);
      }
      segments[index].members.push_back(i);
      places[i] = {index, sizes[index - old], tensors_[i].numel()};
      sizes[index - old] += tensors_[i].numel();
    }
    for (size_t s = old; s < segments.size(); ++s) {
      // LibTorch's allocators align to 64 bytes or more.
      const auto size = sizes[s - old];
      const auto options = tensors_[segments[s].members.front()].options().requires_grad(false);
      segments[s].values = torch::empty({size}, options);
      segments[s].gradients = torch::zeros({size}, options);
      for (size_t c = 0; c < columns_; ++c) segments[s].columns.push_back(torch::zeros({size}, options));
    }
  }

  /// Puts a tensor into its place.
  void move_in(size_t i) {
    auto& slice = slices_[i];
    slice.value = view(segment_of(i).values, i);
    slice.address = slice.value.data_ptr();
    // variable_data() gives each gradient a version of its own; as views of the buffer all would share one.
    slice.gradient = view(segment_of(i).gradients, i).variable_data();
    slice.versions = slice.gradient.unsafeGetTensorImpl()->version_counter();
    const auto sizes = slice.value.sizes();
    slice.sizes.assign(sizes.begin(), sizes.end());
    slice.value.copy_(tensors_[i]);
    tensors_[i].set_data(slice.value);
  }

  /// Makes the segments anew from what the tensors are now. Columns move along; gradients follow in `gather`.
  void arrange() {
    torch::NoGradGuard no_grad;
    std::vector<Segment> segments;
    std::vector<Place> places(tensors_.size());
    lay_out(0, segments, places);
    const bool first_time = segments_.empty();
    auto old_segments = std::exchange(segments_, std::move(segments));
    auto old_places = std::exchange(places_, std::move(places));
    auto old_slices = std::exchange(slices_, std::vector<Slice>(tensors_.size()));
    for (size_t i = 0; i < tensors_.size(); ++i) {
      move_in(i);
      if (first_time) continue;
      const auto& old = old_slices[i];
      if (tensors_[i].grad().is_same(old.gradient) && !old.is_written()) {
        tensors_[i].mutable_grad() = Tensor();
      }
      for (size_t c = 0; c < columns_; ++c) {
        const auto& from = old_segments[old_places[i].segment].columns[c];
        column(c, i).copy_(
            from.narrow(0, old_places[i].offset, tensors_[i].numel()).view(tensors_[i].sizes()));
      }
    }
  }

  std::vector<Tensor> tensors_;
  std::vector<size_t> groups_;
  size_t columns_ = 0;
  std::vector<Segment> segments_;
  std::vector<Place> places_;
  std::vector<Slice> slices_;
  std::vector<char> defined_;
};

/// The order in which tensors named `<parent>.<layer>.<method>.<tensor>` should lie: by parent, then by
/// method and tensor, then by layer. So the factors A of a query, a key and a value, which share their input,
/// are contiguous.
inline std::vector<size_t> flat_order(const std::vector<std::string>& names) {
  const auto keys = [](const std::string& name) {
    size_t dots[3] = {0, 0, 0};
    for (size_t from = std::string::npos, i = 0; i < 3; ++i) {
      const auto dot = name.rfind('.', from);
      if (dot == std::string::npos || dot == 0) break;
      dots[i] = dot;
      from = dot - 1;
    }
    return std::pair(name.substr(0, dots[2]), name.substr(dots[1]));
  };
  std::vector<std::string> parents, kinds;
  std::vector<std::tuple<size_t, size_t, size_t>> ranks;
  const auto rank = [](std::vector<std::string>& seen, std::string key) {
    const auto found = static_cast<size_t>(std::find(seen.begin(), seen.end(), key) - seen.begin());
    if (found == seen.size()) seen.push_back(std::move(key));
    return found;
  };
  for (size_t i = 0; i < names.size(); ++i) {
    auto [parent, kind] = keys(names[i]);
    const auto first = rank(parents, std::move(parent));
    ranks.emplace_back(first, rank(kinds, std::move(kind)), i);
  }
  std::sort(ranks.begin(), ranks.end());
  std::vector<size_t> order;
  for (const auto& item : ranks) order.push_back(std::get<2>(item));
  return order;
}

}  // namespace peft::internal
