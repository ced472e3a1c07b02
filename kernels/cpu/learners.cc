#include "cpu/learners.h"

#include "cpu/arena.h"
#include "cpu/multiply.h"

namespace thresher {
namespace {

constexpr int64_t PART = 512;                // tokens that one block of columns passes at once
constexpr int64_t WORTH = int64_t{1} << 22;  // multiplications that are worth a thread

// Weights of all learners; v and c are null without a second factor.
template <class T>
struct Learners {
  Learners(const Context& context, bool gated, int64_t count, int64_t width)
      : v(nullptr), c(nullptr), count(count), width(width) {
    const Tensor<T> up = context.input<T>(2), bias = context.input<T>(3);
    demand(up.shape.size() == 3 && up.shape[0] == count && up.shape[1] == width,
           "w1 is [L, D, H] of x [B, N, D] and L learners", up.shape);
    hidden = up.shape[2];
    demand(bias.shape == Shape{count, hidden}, "b1 is [L, H] for w1 [L, D, H]", bias.shape);
    w1 = up.data, b1 = bias.data;
    if (gated) {
      const Tensor<T> factor = context.input<T>(4), shift = context.input<T>(5);
      demand(factor.shape == up.shape, "v is shaped as w1", factor.shape);
      demand(shift.shape == bias.shape, "c is shaped as b1", shift.shape);
      v = factor.data, c = shift.data;
    }
    const Tensor<T> down = context.input<T>(gated ? 6 : 4);
    demand(down.shape == Shape{count, hidden, width}, "w2 is [L, H, D] for w1 [L, D, H]", down.shape);
    const Tensor<T> begin = context.input<T>(gated ? 7 : 5);
    demand(begin.shape == Shape{width}, "b2 is [D] of x [B, N, D]", begin.shape);
    w2 = down.data, b2 = begin.data;
  }

  const T *w1, *b1, *v, *c, *w2, *b2;
  int64_t count, width, hidden;
};

template <class T>
THRESHER_VECTORISED void widen_row(Wide<T>* to, const T* from, int64_t width) {
  begin_sum<T>(to, 1, from, width);
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
    const int64_t count = static_cast<int64_t>(choice_.tokens.size());
    W* rows = arena_.take<W>(count * of_.width);
    context_.parallel(count, row_grain<T>(of_.width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        widen_row(rows + i * of_.width, x + choice_.tokens[i] * of_.width, of_.width);
    });
    return rows;
  }

  // The hidden values of all groups: [rows, H].
  const W* open(const W* x, Activation activation) {
    W* hidden = arena_.take<W>(choice_.rows() * of_.hidden);
    W* factor = of_.v ? arena_.take<W>(choice_.rows() * of_.hidden) : nullptr;
    Products list;
    std::vector<const T*> biases;
    const int64_t blocks = blocks_of(of_.hidden), tasks = parts() * blocks;
    for (int64_t task = 0; task < tasks; ++task) {
      for (int64_t learner = 0; learner < of_.count; ++learner) {
        const Group& group = choice_.groups[task / blocks * of_.count + learner];
        if (group.count == 0) continue;
        const auto add = [&](const T* matrices, const T* bias, W* to) {
          const Columns<T> matrix(matrices + learner * of_.width * of_.hidden, of_.width,
                                  of_.hidden, task % blocks);
          list.all.push_back({x + group.first * of_.width, group.count, matrix,
                              to + group.before * of_.hidden + task % blocks * BLOCK, of_.hidden,
                              nullptr});
          biases.push_back(bias + learner * of_.hidden + task % blocks * BLOCK);
        };
        add(of_.w1, of_.b1, hidden);
        if (of_.v) add(of_.v, of_.c, factor);
      }
      list.close();
    }
    const size_t step = of_.v ? 2 : 1;
    context_.parallel(tasks, grain(tasks, of_.v ? 2 : 1), [&](int64_t begin, int64_t end) {
      for (size_t i = list.ends[begin]; i < list.ends[end]; ++i)
        for (int64_t row = 0; row < list.all[i].rows; ++row)
          widen_row(list.all[i].y + row * of_.hidden, biases[i], list.all[i].matrix.width);
      list.multiply(begin, end);
      for (size_t i = list.ends[begin]; i < list.ends[end]; i += step)
        for (int64_t row = 0; row < list.all[i].rows; ++row) {
          const int64_t width = list.all[i].matrix.width;
          W* values = list.all[i].y + row * of_.hidden;
          activate(activation, values, width);
          if (step == 1) continue;
          const W* factors = list.all[i + 1].y + row * of_.hidden;
          for (int64_t column = 0; column < width; ++column) values[column] *= factors[column];
        }
    });
    return hidden;
  }

  // The output bias and the sums of all learners of a token.
  void close(const W* hidden, T* y) {
    W* sums = nullptr;
    if constexpr (std::is_same_v<T, W>)
      sums = y;
    else
      sums = arena_.take<W>(choice_.parts.back() * of_.width);
    Products list;
    const int64_t blocks = blocks_of(of_.width), tasks = parts() * blocks;
    for (int64_t task = 0; task < tasks; ++task) {
      for (int64_t learner = 0; learner < of_.count; ++learner) {
        const Group& group = choice_.groups[task / blocks * of_.count + learner];
        if (group.count == 0) continue;
        const Columns<T> matrix(of_.w2 + learner * of_.width * of_.hidden, of_.hidden, of_.width,
                                task % blocks);
        list.all.push_back({hidden + group.before * of_.hidden, group.count, matrix,
                            sums + task % blocks * BLOCK, of_.width,
                            choice_.tokens.data() + group.first});
      }
      list.close();
    }
    context_.parallel(tasks, grain(tasks, 1), [&](int64_t begin, int64_t end) {
      each_row(begin, end, blocks, [&](int64_t at, int64_t from, int64_t width) {
        widen_row(sums + at, of_.b2 + from, width);
      });
      list.multiply(begin, end);
      if constexpr (!std::is_same_v<T, W>)
        each_row(begin, end, blocks, [&](int64_t at, int64_t, int64_t width) {
          end_sum<T>(y + at, sums + at, width);
        });
    });
  }

 private:
  // The products of some tasks, one task after another; made before threads are, which must not throw.
  struct Products {
    std::vector<Multiplication<T>> all;
    std::vector<size_t> ends{0};  // of the tasks before

    void close() { ends.push_back(all.size()); }
    void multiply(int64_t begin, int64_t end) const {
      thresher::multiply(all.data() + ends[begin], static_cast<int64_t>(ends[end] - ends[begin]));
    }
  };

  int64_t parts() const { return static_cast<int64_t>(choice_.parts.size()) - 1; }

  // Calls body(place, column, width) for every row of y in some tasks, each a part of the tokens and a block of
  // columns.
  template <class Body>
  void each_row(int64_t begin, int64_t end, int64_t blocks, const Body& body) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task % blocks * BLOCK, width = std::min(BLOCK, of_.width - from);
      const int64_t part = task / blocks;
      for (int64_t token = choice_.parts[part]; token < choice_.parts[part + 1]; ++token)
        body(token * of_.width + from, from, width);
    }
  }

  // How many of the tasks that share the products of all rows are worth a thread.
  int64_t grain(int64_t tasks, int64_t matrices) const {
    const int64_t work = choice_.rows() * of_.width * of_.hidden * matrices;
    return std::max<int64_t>(1, tasks * WORTH / std::max<int64_t>(1, work));
  }

  const Context& context_;
  const Learners<T>& of_;
  const Choice& choice_;
  Arena arena_;
};

}  // namespace

Choice::Choice(int64_t tokens) {
  const int64_t count = (tokens + PART - 1) / PART;
  for (int64_t part = 0; part < count; ++part) parts.push_back(tokens * part / count);
  parts.push_back(tokens);
}

Choice Choice::by_count(const int64_t* k, int64_t tokens, int64_t learners) {
  Choice choice(tokens);
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
  return choice;
}

Choice Choice::by_mask(const Bool* run, int64_t tokens, int64_t learners) {
  Choice choice(tokens);
  for (size_t part = 0; part + 1 < choice.parts.size(); ++part)
    for (int64_t learner = 0; learner < learners; ++learner) {
      const int64_t first = static_cast<int64_t>(choice.tokens.size());
      for (int64_t token = choice.parts[part]; token < choice.parts[part + 1]; ++token)
        if (run[token * learners + learner].value) choice.tokens.push_back(token);
      choice.add(first, static_cast<int64_t>(choice.tokens.size()) - first);
    }
  return choice;
}

LearnersNode::LearnersNode(const Attributes& given, const char* count_name, bool gated)
    : count(given.integer(count_name)), activation_(activation_called(given.text("activation"))),
      gated_(gated) {}

template <class T>
void LearnersNode::run(const Context& context, const Choice& choice) const {
  const Tensor<T> x = context.input<T>(0);
  const Learners<T> learners(context, gated_, count, x.shape[2]);
  const T* matrices[] = {learners.w1, learners.v, learners.w2};
  for (int i = 0; i < 3; ++i)  // a block of columns touches every row, each in a page of its own
    if (matrices[i])
      pages_[i].hold(matrices[i], sizeof(T) * static_cast<size_t>(count * learners.width * learners.hidden));
  T* y = context.output<T>(0, x.shape);
  Run<T> run(context, learners, choice);
  run.close(run.open(run.gather(x.data), activation_), y);
}

#define THRESHER_INSTANTIATE(T) \
  template void LearnersNode::run<T>(const Context&, const Choice&) const
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
