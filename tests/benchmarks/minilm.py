"""Token reduction on MiniLM: rated tweets, Spearman correlation and polarity.

python -m tests.benchmarks.minilm [--limit 300] [--learn 2048 --methods acm.yaml channels.yaml] [--json FILE]

Methods that learn or calibrate do so on the first ``--learn`` tweets of the training split, without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks import zoo
from tests.benchmarks.common import parser, study
from tests.benchmarks.data import tweets
from tests.benchmarks.report import finish
from thresher.models.data import Dataset
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable

DRAWN = 4199
TRAIN_SHARE = 0.7
CLEAR = 0.5  # ratings beyond this are clearly positive or negative
LONGEST = 128
BATCH = 32
WORDS = 64  # of a tweet that is learned from, at most


def spearman(pairs: NDArray[np.float64]) -> float:
    """Rank correlation of the two columns of ``[n, 2]``."""
    from scipy.stats import rankdata

    ranks = rankdata(pairs, axis=0)
    return float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1])


def tokenizer() -> Any:
    """The checkpoint's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo.minilm_folder())


def embed(runnable: Runnable, words: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors ``[N, 384]``; batches of like length, padded to the longest in each."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    vectors = np.empty((len(texts), zoo.WIDTH), np.float32)
    for start in range(0, len(texts), BATCH):
        chosen = order[start : start + BATCH]
        made = words(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="np",
        )
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        vectors[chosen] = runnable.run(inputs)["vector"]
    return vectors


def texts_to_learn(words: Any, texts: Sequence[str]) -> Dataset:
    """Tweets as data without labels, padded to the longest."""
    made = words(list(texts), padding=True, truncation=True, max_length=WORDS, return_tensors="np")
    inputs = {name: made[name] for name in ("input_ids", "attention_mask")}

    def read(chosen: Sequence[int]) -> dict[str, Any]:
        return {name: array[list(chosen)] for name, array in inputs.items()}

    return Dataset("tweets", len(texts), None, read)


class Rating:
    """Heads that are fitted to the dense model's sentence vectors and then kept."""

    def __init__(self, limit: int) -> None:
        self.tokenizer = tokenizer()
        texts, ratings = tweets()
        order = np.random.default_rng(0).permutation(len(texts))[:DRAWN]
        cut = round(TRAIN_SHARE * len(order))
        train, test = order[:cut], order[cut:][:limit]
        self.train = ([texts[i] for i in train], ratings[train])
        self.test = ([texts[i] for i in test], ratings[test])
        self.heads: tuple[Any, Any] | None = None

    def __call__(self, runnable: Runnable) -> list[Metric]:
        """Both scores; the first runnable, which is the dense one, is what heads are fitted to."""
        if self.heads is None:
            self.heads = self.fit(runnable)
        regression, classifier = self.heads
        texts, ratings = self.test
        vectors = embed(runnable, self.tokenizer, texts)
        clear = np.abs(ratings) > CLEAR
        signs = classifier.predict(vectors[clear])
        return [
            Metric("Spearman", np.stack([regression.predict(vectors), ratings], 1), spearman),
            Metric("polarity", signs == (ratings[clear] > 0)),
        ]

    def fit(self, runnable: Runnable) -> tuple[Any, Any]:
        from sklearn.linear_model import LogisticRegression, RidgeCV

        texts, ratings = self.train
        vectors = embed(runnable, self.tokenizer, texts)
        clear = np.abs(ratings) > CLEAR
        regression = RidgeCV(np.logspace(-3, 3, 13)).fit(vectors, ratings)
        classifier = LogisticRegression(C=10, max_iter=1000)
        return regression, classifier.fit(vectors[clear], ratings[clear] > 0)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=round((1 - TRAIN_SHARE) * DRAWN))
    options.add_argument("--learn", type=int, default=0, help="tweets that methods may learn on")
    args = options.parse_args(argv)
    rating = Rating(args.limit)
    learn = texts_to_learn(rating.tokenizer, rating.train[0][: args.learn]) if args.learn else None
    finish(
        [
            study(
                f"MiniLM, rated tweets, {args.limit:,} test tweets",
                zoo.minilm(),
                rating,
                args,
                data=learn,
                batch=BATCH,
                sizes={"sequence": zoo.TRACED_WORDS},
                notes=[
                    "the heads of the dense model are kept, not fitted again",
                    f"ideal and times at {zoo.TRACED_WORDS} tokens without padding",
                ],
            )
        ],
        args,
    )


if __name__ == "__main__":
    main()
