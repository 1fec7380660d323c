"""`resofilter join`: the scores of shards that were scored apart, as one table. Never imports torch."""

from __future__ import annotations

import argparse
from shlex import quote

from .inputs import dataset_of, require
from .parser import CommandParser

EXAMPLES = (
    "resofilter join scores-0/ scores-1/ scores-2/ --output scores/",
    "resofilter join scores-*/ --output scores/ --dataset rows.jsonl",
)
LISTED = 10  # shards


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the join."""
    several = "folders or files of scores; those of files in the order of the dataset, those of --shard in any order"
    parser.add_argument("scores", nargs="*", help=f"{several} (required)")
    parser.needed("--output", help="a folder for the joined scores")
    parser.add_argument("--dataset", help="the whole dataset, to compare the rows of every shard with it now")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--dataset_config", help="its configuration on the hub")
    parser.add_argument("--partial", action="store_true", help="join shards although rows of the dataset are missing")
    parser.add_argument("--overwrite", action="store_true", help="replace scores in that folder")


def run(args: argparse.Namespace) -> None:
    """Join saved scores, and print which shards they are of."""
    from ..scores.joined_file import join_scores, open_scores
    from ..scores.shards import missing_of, shards_of, told

    require(args, "scores", "output")
    dataset = dataset_of(args) if args.dataset else None
    path = join_scores(args.scores, args.output, partial=args.partial, dataset=dataset, overwrite=args.overwrite)
    made = open_scores(path)[1]
    shards, missing = shards_of(made), missing_of(made)
    print(f"{sum(each.rows for each in shards):,} rows of {len(shards)} shards")
    for each in shards[:LISTED]:
        print(f"  {each}")
    if len(shards) > LISTED:
        print(f"  and {len(shards) - LISTED} more")
    print(f"Scores: {path}")
    if missing:
        print(f"{told(missing, made.rows)} are in no shard. Join these scores with those of the missing shards.")
    else:
        print(f"Next: resofilter select {quote(args.output)} --keep 0.5 --output kept")
