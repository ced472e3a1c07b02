#include "cpu/learners.h"

#include "cpu/arena.h"
#include "cpu/multiply.h"

namespace thresher {
namespace {

constexpr int64_t PART = 1024;               // rows that one block of columns passes at once
constexpr int64_t WORTH = int64_t{1} << 22;  // multiplications that are worth a thread

template <class T>
void widen_row(Wide<T>* to, const T* from, int64_t width) {
  dispatch([&](auto) THRESHER_INLINED { begin_sum<T>(to, 1, from, width); });
}
template <class T>
void begin_rows(Wide<T>* to, int64_t stride, const int64_t* rows, int64_t count, const T* begin) {
  dispatch([&](auto) THRESHER_INLINED {
    for (int64_t i = 0; i < count; ++i) begin_sum<T>(to + rows[i] * stride, 1, begin, BLOCK);
  });
}
template <class T>
void end_rows(T* to, int64_t stride, const Wide<T>* sums, int64_t sums_stride, int64_t rows, int64_t width) {
  dispatch([&](auto) THRESHER_INLINED {
    for (int64_t row = 0; row < rows; ++row) end_sum<T>(to + row * stride, sums + row * sums_stride, width);
  });
}
template <class W>
void multiply_rows(const Rows<W>& of, const W* factors) {
  dispatch([&](auto) THRESHER_INLINED {
    for (int64_t row = 0; row < of.count; ++row)
      for (int64_t i = 0; i < of.width; ++i) of.data[row * of.stride + i] *= factors[row * of.stride + i];
  });
}

template <class T>
class Run {
  using W = Wide<T>;
  using Group = Choice::Group;

 public:
  Run(const Context& context, const Learners<T>& of, const Choice& choice)
      : context_(context), of_(of), choice_(choice) {}

  // Rows of x [tokens, D] in the order of the choice.
  const W* gather(const T* x) {
    const int64_t count = static_cast<int64_t>(choice_.tokens.size()), width = of_.w1.depth();
    W* rows = arena_.take<W>(count * width);
    context_.parallel(count, row_grain<T>(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        widen_row(rows + i * width, x + choice_.tokens[i] * width, width);
    });
    return rows;
  }

  // The hidden values of all groups: [rows, H], padded to whole blocks.
  const W* open(const W* x, Activation activation) {
    const int64_t width = of_.w1.depth(), stride = of_.w1.blocks() * BLOCK;
    W* hidden = arena_.take<W>(choice_.rows() * stride);
    W* factor = of_.v ? arena_.take<W>(choice_.rows() * stride) : nullptr;
    const Products list = products(of_.w1, [&](auto& all, const Group& group, int64_t learner,
                                               int64_t block) {
      const auto add = [&](const Packed<T>& matrices, const Packed<T>& biases, W* to) {
        all.push_back({x + group.first * width, width, group.count, matrices.block(learner, block), width,
                       biases.block(learner, block), to + group.before * stride + block * BLOCK, stride,
                       nullptr});
      };
      add(of_.w1, of_.b1, hidden);
      if (factor) add(*of_.v, *of_.c, factor);
    });
    const size_t step = factor ? 2 : 1;
    context_.parallel(list.tasks(), grain(list, step), [&](int64_t begin, int64_t end) {
      list.multiply(begin, end);
      for (size_t i = list.ends[begin]; i < list.ends[end]; i += step) {
        const Rows<W> found{list.all[i].y, list.all[i].rows, BLOCK, stride};
        activate(activation, found);
        if (factor) multiply_rows(found, list.all[i + 1].y);
      }
    });
    return hidden;
  }

  // The output bias and the sums of all learners of a token.
  void close(const W* hidden, T* y) {
    const int64_t width = of_.w1.depth(), depth = of_.w2.depth();
    const int64_t stride = of_.w2.blocks() * BLOCK;
    W* sums = nullptr;
    if constexpr (std::is_same_v<T, W>) sums = stride == width ? y : nullptr;
    const bool apart = !sums;
    if (apart) sums = arena_.take<W>(choice_.parts.back() * stride);
    const Products list = products(of_.w2, [&](auto& all, const Group& group, int64_t learner,
                                               int64_t block) {
      const int64_t from = of_.w1.blocks() * BLOCK;
      all.push_back({hidden + group.before * from, from, group.count, of_.w2.block(learner, block),
                     depth, learner == 0 ? of_.b2.block(0, block) : nullptr, sums + block * BLOCK, stride,
                     choice_.tokens.data() + group.first});
    });
    context_.parallel(list.tasks(), grain(list, 1), [&](int64_t begin, int64_t end) {
      each_task(begin, end, [&](int64_t part, int64_t block) {
        const int64_t first = choice_.idle_before[part], count = choice_.idle_before[part + 1] - first;
        begin_rows(sums + block * BLOCK, stride, choice_.idle.data() + first, count, of_.b2.block(0, block));
      });
      list.multiply(begin, end);
      if (!apart) return;
      each_task(begin, end, [&](int64_t part, int64_t block) {
        const int64_t first = choice_.parts[part], from = block * BLOCK;
        end_rows<T>(y + first * width + from, width, sums + first * stride + from, stride,
                    choice_.parts[part + 1] - first, std::min(BLOCK, width - from));
      });
    });
  }

 private:
  // The products of some tasks, one task after another; made before threads are, which must not throw.
  struct Products {
    std::vector<Multiplication<T>> all;
    std::vector<size_t> ends{0};  // of the tasks before

    int64_t tasks() const { return static_cast<int64_t>(ends.size()) - 1; }
    void multiply(int64_t begin, int64_t end) const {
      const size_t first = ends[begin], last = ends[end];
      thresher::multiply(all.data() + first, static_cast<int64_t>(last - first), last < all.size());
    }
  };

  // A task is a part of the tokens and a block of columns; add(all, group, learner, block) adds the
  // product of a group.
  template <class Add>
  Products products(const Packed<T>& of, const Add& add) const {
    Products list;
    for (int64_t part = 0; part < parts(); ++part)
      for (int64_t block = 0; block < of.blocks(); ++block) {
        for (int64_t learner = 0; learner < of.count(); ++learner) {
          const Group& group = choice_.groups[part * of.count() + learner];
          if (group.count > 0) add(list.all, group, learner, block);
        }
        list.ends.push_back(list.all.size());
      }
    return list;
  }

  int64_t parts() const { return static_cast<int64_t>(choice_.parts.size()) - 1; }

  // Calls body(part, block) for some tasks of `close`.
  template <class Body>
  void each_task(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t task = begin; task < end; ++task) body(task / of_.w2.blocks(), task % of_.w2.blocks());
  }

  // How many of the tasks that share the products of all rows are worth a thread.
  int64_t grain(const Products& list, int64_t matrices) const {
    const int64_t work = choice_.rows() * of_.w1.depth() * of_.w2.depth() * matrices;
    return std::max<int64_t>(1, list.tasks() * WORTH / std::max<int64_t>(1, work));
  }

  const Context& context_;
  const Learners<T>& of_;
  const Choice& choice_;
  Arena arena_;
};

}  // namespace

Choice::Choice(int64_t tokens, int64_t rows) {
  const int64_t count = std::min(tokens, rows / PART + 1);
  for (int64_t part = 0; part < count; ++part) parts.push_back(tokens * part / count);
  parts.push_back(tokens);
}

template <class Runs>
void Choice::set_idle(const Runs& runs_first) {
  for (size_t part = 0; part + 1 < parts.size(); ++part) {
    for (int64_t token = parts[part]; token < parts[part + 1]; ++token)
      if (!runs_first(token)) idle.push_back(token);
    idle_before.push_back(static_cast<int64_t>(idle.size()));
  }
}

Choice Choice::by_count(const int64_t* k, int64_t tokens, int64_t learners) {
  int64_t rows = 0;
  for (int64_t token = 0; token < tokens; ++token) rows += std::clamp<int64_t>(k[token], 0, learners);
  Choice choice(tokens, rows);
  for (size_t part = 0; part + 1 < choice.parts.size(); ++part) {
    const int64_t first = static_cast<int64_t>(choice.tokens.size());
    std::vector<int64_t> running(static_cast<size_t>(learners) + 1);  // at least so many learners
    for (int64_t level = learners; level > 0; --level) {
      for (int64_t token = choice.parts[part]; token < choice.parts[part + 1]; ++token)
        if (k[token] == level || (level == learners && k[token] > level))
          choice.tokens.push_back(token);
      running[level] = static_cast<int64_t>(choice.tokens.size()) - first;
    }
    for (int64_t learner = 0; learner < learners; ++learner)
      choice.add(first, running[learner + 1]);
  }
  choice.set_idle([&](int64_t token) { return learners > 0 && k[token] > 0; });
  return choice;
}

Choice Choice::by_mask(const Bool* run, int64_t tokens, int64_t learners) {
  const int64_t rows = std::count_if(run, run + tokens * learners, [](Bool one) { return one.value != 0; });
  Choice choice(tokens, rows);
  for (size_t part = 0; part + 1 < choice.parts.size(); ++part)
    for (int64_t learner = 0; learner < learners; ++learner) {
      const int64_t first = static_cast<int64_t>(choice.tokens.size());
      for (int64_t token = choice.parts[part]; token < choice.parts[part + 1]; ++token)
        if (run[token * learners + learner].value) choice.tokens.push_back(token);
      choice.add(first, static_cast<int64_t>(choice.tokens.size()) - first);
    }
  choice.set_idle([&](int64_t token) { return learners > 0 && run[token * learners].value; });
  return choice;
}

template <class T>
Learners<T> LearnersNode<T>::read(const Context& context) const {
  const int64_t width = context.input<T>(0).shape[2];
  const Tensor<T> w1 = context.input<T>(2), b1 = context.input<T>(3);
  demand(w1.shape.size() == 3 && w1.shape[0] == count && w1.shape[1] == width,
         "w1 is [L, D, H] of x [B, N, D] and L learners", w1.shape);
  const int64_t hidden = w1.shape[2];
  demand(b1.shape == Shape{count, hidden}, "b1 is [L, H] for w1 [L, D, H]", b1.shape);
  const Tensor<T> w2 = context.input<T>(gated_ ? 6 : 4), b2 = context.input<T>(gated_ ? 7 : 5);
  demand(w2.shape == Shape{count, hidden, width}, "w2 is [L, H, D] for w1 [L, D, H]", w2.shape);
  demand(b2.shape == Shape{width}, "b2 is [D] of x [B, N, D]", b2.shape);
  Learners<T> found{{w1.data, count, width, hidden}, {b1.data, count, 1, hidden},
                    {w2.data, count, hidden, width}, {b2.data, 1, 1, width}, nullptr, nullptr};
  if (gated_) {
    const Tensor<T> v = context.input<T>(4), c = context.input<T>(5);
    demand(v.shape == w1.shape, "v is shaped as w1", v.shape);
    demand(c.shape == b1.shape, "c is shaped as b1", c.shape);
    found.v = std::make_unique<Packed<T>>(v.data, count, width, hidden);
    found.c = std::make_unique<Packed<T>>(c.data, count, 1, hidden);
  }
  return found;
}

template <class T>
void LearnersNode<T>::run(const Context& context, const Choice& choice) const {
  bool constant = true;
  for (size_t input = 2; input < (gated_ ? 8 : 6); ++input) constant &= context.constant(input);
  std::unique_ptr<const Learners<T>> own;
  if (constant)
    std::call_once(packed_, [&] { held_ = std::make_unique<Learners<T>>(read(context)); });
  else
    own = std::make_unique<Learners<T>>(read(context));
  const Learners<T>& learners = constant ? *held_ : *own;
  const Tensor<T> x = context.input<T>(0);
  demand(x.shape[2] == learners.w1.depth(), "x is [B, N, D] for w1 [L, D, H]", x.shape);
  T* y = context.output<T>(0, x.shape);
  Run<T> run(context, learners, choice);
  run.close(run.open(run.gather(x.data), activation_), y);
}

template class LearnersNode<float>;
template class LearnersNode<Half>;
template class LearnersNode<BFloat16>;
template class LearnersNode<double>;

}  // namespace thresher
