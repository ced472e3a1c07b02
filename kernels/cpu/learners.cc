#include "cpu/learners.h"

#include "cpu/arena.h"
#include "cpu/multiply.h"

namespace thresher {
namespace {

constexpr int64_t PART = 512;                // tokens
constexpr int64_t WORTH = int64_t{1} << 22;  // multiplications that are worth a thread

template <Activation KIND, class W>
THRESHER_VECTORISED void bend(W* row, int64_t width) {
  activate_all<KIND>(row, width);
}
template <class W>
auto bender(Activation kind) {
  switch (kind) {
    case Activation::SILU: return bend<Activation::SILU, W>;
    case Activation::GELU: return bend<Activation::GELU, W>;
    case Activation::GELU_TANH: return bend<Activation::GELU_TANH, W>;
    case Activation::QUICK_GELU: return bend<Activation::QUICK_GELU, W>;
    case Activation::RELU: return bend<Activation::RELU, W>;
    default: return bend<Activation::IDENTITY, W>;
  }
}

template <class T>
THRESHER_VECTORISED void widen_row(Wide<T>* to, const T* from, int64_t width) {
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
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
    const auto bent = bender<W>(activation);
    const int64_t blocks = blocks_of(of_.hidden), tasks = parts() * blocks;
    const int64_t matrices = of_.v ? 2 : 1;
    context_.parallel(tasks, grain(tasks, matrices), [&](int64_t begin, int64_t end) {
      std::vector<Multiplication<T>> products;
      for (int64_t task = begin; task < end; ++task)
        for (int64_t learner = 0; learner < of_.count; ++learner) {
          first(products, task / blocks, learner, task % blocks, x, of_.w1, of_.b1, hidden);
          if (of_.v) first(products, task / blocks, learner, task % blocks, x, of_.v, of_.c, factor);
        }
      multiply(products.data(), static_cast<int64_t>(products.size()));
      for (size_t i = 0; i < products.size(); i += static_cast<size_t>(matrices))
        for (int64_t row = 0; row < products[i].rows; ++row) {
          const int64_t width = products[i].matrix.width;
          W* values = products[i].y + row * of_.hidden;
          bent(values, width);
          if (!of_.v) continue;
          const W* factors = products[i + 1].y + row * of_.hidden;
          for (int64_t column = 0; column < width; ++column) values[column] *= factors[column];
        }
    });
    return hidden;
  }

  // The sums of all learners of a token.
  void close(const W* hidden, T* y) {
    const int64_t tokens = choice_.parts.back();
    W* sums = nullptr;
    if constexpr (std::is_same_v<T, W>)
      sums = y;
    else
      sums = arena_.take<W>(tokens * of_.width);
    const int64_t blocks = blocks_of(of_.width), tasks = parts() * blocks;
    context_.parallel(tasks, grain(tasks, 1), [&](int64_t begin, int64_t end) {
      std::vector<Multiplication<T>> products;
      for (int64_t task = begin; task < end; ++task)
        second(products, task / blocks, task % blocks, hidden, sums);
      multiply(products.data(), static_cast<int64_t>(products.size()));
      if constexpr (!std::is_same_v<T, W>)
        for (int64_t task = begin; task < end; ++task)
          each_row(task / blocks, task % blocks, [&](int64_t at, int64_t width) {
            end_sum<T>(y + at, sums + at, width);
          });
    });
  }

 private:
  int64_t parts() const { return static_cast<int64_t>(choice_.parts.size()) - 1; }

  // A bias, and the product that is added to it, for one group and one block of columns.
  void first(std::vector<Multiplication<T>>& products, int64_t part, int64_t learner, int64_t block,
             const W* x, const T* matrices, const T* biases, W* to) const {
    const Group& group = choice_.groups[part * of_.count + learner];
    if (group.count == 0) return;
    const Columns<T> matrix(matrices + learner * of_.width * of_.hidden, of_.width, of_.hidden,
                            block);
    W* values = to + group.before * of_.hidden + block * BLOCK;
    for (int64_t row = 0; row < group.count; ++row)
      widen_row(values + row * of_.hidden, biases + learner * of_.hidden + block * BLOCK,
                matrix.width);
    products.push_back(
        {x + group.first * of_.width, group.count, matrix, values, of_.hidden, nullptr});
  }

  // Zeros, and the products of all learners that are added to them, for one part and one block.
  void second(std::vector<Multiplication<T>>& products, int64_t part, int64_t block, const W* hidden,
              W* sums) const {
    each_row(part, block, [&](int64_t at, int64_t width) { std::fill_n(sums + at, width, W(0)); });
    for (int64_t learner = 0; learner < of_.count; ++learner) {
      const Group& group = choice_.groups[part * of_.count + learner];
      if (group.count == 0) continue;
      const Columns<T> matrix(of_.w2 + learner * of_.width * of_.hidden, of_.hidden, of_.width,
                              block);
      products.push_back({hidden + group.before * of_.hidden, group.count, matrix,
                          sums + block * BLOCK, of_.width, choice_.tokens.data() + group.first});
    }
  }

  // Calls body(place, width) for the columns of a block in all rows of a part.
  template <class Body>
  void each_row(int64_t part, int64_t block, const Body& body) const {
    const int64_t width = std::min(BLOCK, of_.width - block * BLOCK);
    for (int64_t token = choice_.parts[part]; token < choice_.parts[part + 1]; ++token)
      body(token * of_.width + block * BLOCK, width);
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

Activation activation_called(const std::string& name) {
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  if (name == "identity") return Activation::IDENTITY;
  if (name == "quick_gelu") return Activation::QUICK_GELU;
  if (name == "relu") return Activation::RELU;
  if (name == "silu") return Activation::SILU;
  throw Error("no activation " + name);
}

template <class T>
Learners<T>::Learners(const Context& context, bool gated, int64_t count, int64_t width)
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
  w2 = down.data;
}

template <class T>
void Learners<T>::in_large_pages(const std::array<LargePages, 3>& pages) const {
  const T* matrices[] = {w1, v, w2};
  for (size_t i = 0; i < pages.size(); ++i)
    if (matrices[i])
      pages[i].hold(matrices[i], sizeof(T) * static_cast<size_t>(count * width * hidden));
}

template <class T>
void run_learners(const Context& context, const Learners<T>& learners, Activation activation,
                  const Choice& choice, const T* x, T* y) {
  Run<T> run(context, learners, choice);
  run.close(run.open(run.gather(x), activation), y);
}

#define THRESHER_INSTANTIATE(T)                                                               \
  template struct Learners<T>;                                                                \
  template void run_learners<T>(const Context&, const Learners<T>&, Activation, const Choice&, \
                                const T*, T*)
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
