"""What a site reaches by itself: the number that federated training has to beat.

    python -m metisfl.learner.alone --app hearts:Hearts --path FOLDER --sources A B --epochs 20

Rule: the same app, trainer, initial model and number of epochs as in the federation, and the same
judge: the test splits of all sources together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metisfl.learner.app import load_app, prepare_environment, trainer_for
from metisfl.learner.trainer import Hyperparameters, Trainer, derive_seed
from metisfl.proto.errors import MetisError, UserError

__all__ = ["accuracy_alone", "main"]


def accuracy_alone(
    trainers: Mapping[str, Trainer],
    hyperparameters: Hyperparameters,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, float]:
    """Share of correct answers on all test splits, for a model trained on each source alone.

    `trainers` holds one for each source. Raises UserError, also when the app's model was not
    compiled with the metric "accuracy".
    """
    initial = next(iter(trainers.values())).initialise(derive_seed(seed, 0, "all"))
    accuracies = {}
    unwatched = (lambda fraction, metrics: None), (lambda: False)
    for source, trainer in trainers.items():
        result = trainer.train(
            initial,
            hyperparameters,
            derive_seed(seed, 1, source),
            *unwatched,
        )
        scores = [each.evaluate(result.tensors, *unwatched).metrics for each in trainers.values()]
        accuracies[source] = _pooled_accuracy(scores)
        report(
            f"{source}: {result.examples} training examples, {result.batches} batches, "
            f"accuracy {accuracies[source]:.3f}"
        )
    return accuracies


def _pooled_accuracy(scores: Sequence[Mapping[str, float]]) -> float:
    correct = examples = 0.0
    for metrics in scores:
        if "test.accuracy" not in metrics or "test.examples" not in metrics:
            raise UserError(
                'the app\'s evaluation gives no "test.accuracy" and "test.examples"; compile its '
                'model with metrics=["accuracy"]'
            )
        correct += metrics["test.accuracy"] * metrics["test.examples"]
        examples += metrics["test.examples"]
    return correct / examples


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON object on stdout: for each source the accuracy; progress on stderr."""
    parser = argparse.ArgumentParser(prog="python -m metisfl.learner.alone", description=__doc__)
    parser.add_argument("--app", required=True, metavar="MODULE:OBJECT")
    parser.add_argument("--path", type=Path, help="folder to import the app from")
    parser.add_argument("--sources", nargs="+", required=True, metavar="SOURCE")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: the app's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    started_s = time.monotonic()
    try:
        if options.epochs < 1 or options.batch_size < 1:
            raise UserError("--epochs and --batch-size must be at least 1")
        prepare_environment()
        # One app for each source: an app that is a trainer remembers which one it opened.
        apps = {source: load_app(options.app, options.path) for source in options.sources}
        accuracies = accuracy_alone(
            {source: trainer_for(app, source) for source, app in apps.items()},
            Hyperparameters(options.epochs, options.batch_size, options.learning_rate),
            options.seed,
            report,
        )
    except MetisError as error:
        report(f"error: {error}")
        return error.exit_code
    report(f"{len(accuracies)} sources in {time.monotonic() - started_s:.1f} s")
    print(json.dumps(accuracies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
