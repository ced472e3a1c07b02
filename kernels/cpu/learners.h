// Networks cut into learners, each of which runs for some of the tokens: one product for each learner, by
// the rows that run it and no others.
#pragma once

#include <memory>
#include <mutex>

#include "cpu/activation.h"
#include "cpu/kernel.h"
#include "cpu/packed.h"
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
  std::vector<int64_t> idle;  // tokens that do not run the first learner, part after part
  std::vector<int64_t> idle_before{0};  // of each part, and of all

 private:
  Choice(int64_t tokens, int64_t rows);
  template <class Runs>
  void set_idle(const Runs& runs_first);
  void add(int64_t first, int64_t count) { groups.push_back({first, count, rows()}); }
};

// The weights of all learners.
template <class T>
struct Learners {
  Packed<T> w1, b1, w2, b2;
  std::unique_ptr<const Packed<T>> v, c;  // null without a second factor
};

// A node whose inputs are tokens x [B, N, D], a choice, and the weights of all learners: w1 [L, D, H], b1 [L, H],
// w2 [L, H, D], and an output bias b2 [D]; before w2, if it is gated, v and c, shaped as w1 and b1, which make
// a second factor.
//
//   y[t] = b2 + sum over the learners n of token t of (act(x[t] w1[n] + b1[n]) * (x[t] v[n] + c[n])) w2[n]
//
// Weights that are constants are packed at the first run and held beside the host's.
template <class T>
class LearnersNode {
 public:
  // `count_name` is the attribute that tells how many learners there are.
  LearnersNode(const Attributes& given, const char* count_name, bool gated)
      : count(given.integer(count_name)), activation_(activation_called(given.text("activation"))),
        gated_(gated) {}

  void run(const Context& context, const Choice& choice) const;

  const int64_t count;

 private:
  Learners<T> read(const Context& context) const;

  const Activation activation_;
  const bool gated_;
  mutable std::once_flag packed_;
  mutable std::unique_ptr<const Learners<T>> held_;
};

}  // namespace thresher
