"""Hyperparameter search: what may be tried, who proposes it, who gives up early, and the trials on Spark.

space      lists and ranges of values                                  `tune.space`
samplers   grid, random, and Optuna's tree of Parzen estimators        `tune.sampling`
pruners    which trials are ended before their last epoch              `tune.pruning`
search     trials in parallel on Spark's slots                         `tune.trials`
result     the record of each trial, the best model                    `tune.result`
"""

from kindling.tune import space
from kindling.tune.pruning import MedianStopping, SuccessiveHalving
from kindling.tune.result import SearchResult, Trial
from kindling.tune.trials import search

__all__ = ["MedianStopping", "SearchResult", "SuccessiveHalving", "Trial", "search", "space"]
