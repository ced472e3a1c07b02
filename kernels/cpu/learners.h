// Networks cut into learners, each of which runs for some of the tokens: one product for each learner, by
// the rows that run it and no others.
#pragma once

#include "cpu/activation.h"
#include "cpu/kernel.h"
#include "cpu/pages.h"
#include "cpu/rows.h"

namespace thresher {

// Which tokens run each learner, in parts whose rows stay in the second cache.
struct Choice {
  struct Group {  // the tokens of one learner in one part
    int64_t first, count;  // among `tokens`
    int64_t before;        // rows of all groups before
  };

  // Tokens run the first k learners.  By falling k, so that the tokens of a learner are the first ones
  // of its part.
  static Choice by_count(const int64_t* k, int64_t tokens, int64_t learners);
  // Tokens run any of them: [tokens, learners].
  static Choice by_mask(const Bool* run, int64_t tokens, int64_t learners);

  int64_t rows() const { return groups.empty() ? 0 : groups.back().before + groups.back().count; }

  std::vector<int64_t> parts;  // the first token of each, and the end of the last
  std::vector<int64_t> tokens;
  std::vector<Group> groups;  // [parts, learners]

 private:
  explicit Choice(int64_t tokens);
  void add(int64_t first, int64_t count) { groups.push_back({first, count, rows()}); }
};

// Weights of all learners: w1 [L, D, H], b1 [L, H] and w2 [L, H, D]; v and c, shaped as w1 and b1, make a
// second factor and are null without one.
template <class T>
struct Learners {
  // Of a node's inputs from the third on: w1, b1, v and c where there are any, w2.  Throws an Error where
  // there are not `count` learners for tokens of this width.
  Learners(const Context& context, bool gated, int64_t count, int64_t width);

  // Blocks of columns are read across all rows, each of which lies in a page of its own.
  void in_large_pages(const std::array<LargePages, 3>& pages) const;

  const T *w1, *b1, *v, *c, *w2;
  int64_t count, width, hidden;
};

// By the names in activations.py.
Activation activation_called(const std::string& name);

// y[t] = sum over the learners n of token t of (act(x[t] w1[n] + b1[n]) * (x[t] v[n] + c[n])) w2[n]
// for tokens x and y [tokens, D].
template <class T>
void run_learners(const Context& context, const Learners<T>& learners, Activation activation,
                  const Choice& choice, const T* x, T* y);

}  // namespace thresher
