"""What a paper says of a study: what was trained, what was tested, with which software."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ultralytics.cfg import DEFAULT_CFG_DICT

from rtdetr_act.evaluation.detection_files import RunScores
from rtdetr_act.evaluation.statistics import LEVEL
from rtdetr_act.formatting import format_count, join_words
from rtdetr_act.study.latex import allow_breaks, escape_latex, wrap_latex
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.run_record import RunRecord, list_values

_MAX_LISTED_SEEDS = 10
_SOFTWARE = {"ultralytics": "Ultralytics", "torch": "PyTorch", "python": "Python"}
_SCORE_TITLES = {"mAP50-95": "mAP", "top1": "top-1 accuracy"}


def group_rows(rows: Sequence[LeaderboardRow]) -> list[list[LeaderboardRow]]:
    """Return the rows of each setting, baselines first and then as they are."""
    blocks: dict[str, list[LeaderboardRow]] = {}
    for row in rows:
        blocks.setdefault(row.setting, []).append(row)
    return [sorted(block, key=lambda row: not row.is_baseline) for block in blocks.values()]


def name_baselines(rows: Sequence[LeaderboardRow]) -> str:
    """Return the activation of the baselines in LaTeX."""
    return join_words(list(dict.fromkeys(escape_latex(row.activation) for row in rows if row.is_baseline)))


def count_comparisons(rows: Sequence[LeaderboardRow]) -> tuple[int, int]:
    """Return how many comparisons the t-test over seeds and the bootstrap over seeds and images were corrected for."""
    paired = [row.comparison.p_holm for row in rows if row.comparison]
    both = [row.over_seeds_and_images.p_holm for row in rows if row.over_seeds_and_images]
    return sum(map(math.isfinite, paired)), sum(map(math.isfinite, both))


def describe_training(records: Sequence[RunRecord]) -> str:
    """Return the model, the data, the epochs and the image size of the runs, as they follow a noun."""
    models, data = (list(map(_shorten_path, list_values(records, name))) for name in ("model", "data"))
    epochs, sizes = (_list_values_or_default(records, name) for name in ("epochs", "imgsz"))
    trained = [
        f"on {join_words(data)}" if data else "",
        f"for {join_words(epochs)} epochs" if epochs else "",
        f"at {join_words(sizes)} pixels" if sizes else "",
    ]
    described = f" of {join_words(models)}" if models else ""
    if any(trained):
        described += f", trained {' '.join(filter(None, trained))}"
    return escape_latex(described)


def _list_values_or_default(records: Sequence[RunRecord], name: str) -> list[str]:
    """Return the values of an argument, with Ultralytics' default for runs that do not set it."""
    values = list_values(records, name)
    if any(record.arguments and not record.arguments.get(name) for record in records):
        values += [str(DEFAULT_CFG_DICT[name])] * (str(DEFAULT_CFG_DICT[name]) not in values)
    return values


def _shorten_path(text: str) -> str:
    """Return the name of a model or data set as a text calls it.

    >>> _shorten_path("configs/rtdetr-l.yaml"), _shorten_path("runs/a/best.pt"), _shorten_path("shapes")
    ('rtdetr-l', 'best.pt', 'shapes')
    """
    return Path(text).name.removesuffix(".yaml").removesuffix(".yml") or text


def describe_seeds(records: Sequence[RunRecord]) -> str:
    """Return the number of seeds, and which if they are few."""
    seeds = sorted({record.seed for record in records})
    listed = f" ({join_words([str(seed) for seed in seeds])})" if 0 < len(seeds) <= _MAX_LISTED_SEEDS else ""
    return format_count(len(seeds), "seed") + listed


def describe_splits(rows: Sequence[LeaderboardRow]) -> str:
    """Return what a test over seeds heeds where each divides the images anew, as it ends a sentence; "" elsewhere."""
    if not any(row.validation_share for row in rows):
        return ""
    return (
        ", each of which divides the images for training and validation anew, with the variance corrected for the "
        "images that runs share (Nadeau and Bengio, 2003)"
    )


def write_methods(
    rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], scores: Mapping[Path, RunScores], *, metric: str
) -> str:
    """Return sentences for the methods section of a paper, in LaTeX.

    Args:
        rows: The leaderboard.
        records: The runs.
        scores: Scores on resamples of the validation images, by run folder; runs may be missing.
        metric: Name of the ranked score, "mAP50-95" or "top1".
    """
    names = [rf"\texttt{{{allow_breaks(escape_latex(row.variant))}}}" for block in group_rows(rows) for row in block]
    noun = "activation" if len({row.activation for row in rows}) == len(rows) else "variant"
    finished = sum(row.summary.runs for row in rows)
    runs = format_count(len(records), "run") + (f", {finished} of which finished" if finished < len(records) else "")
    sentences = [
        f"We compared {format_count(len(rows), noun)} ({join_words(names, len(names))}){describe_training(records)}, "
        f"with {describe_seeds(records)}: {runs}.",
        *_describe_statistics(rows, scores, metric),
        *_describe_software(records),
    ]
    return "\n".join(["% For the methods section. Needs no package.", *wrap_latex(" ".join(sentences)), ""])


def _describe_statistics(rows: Sequence[LeaderboardRow], scores: Mapping[Path, RunScores], metric: str) -> list[str]:
    """Return sentences on what was tested and how it was corrected."""
    paired, both = count_comparisons(rows)
    baseline = name_baselines(rows)
    sentences = []
    if paired:
        sentences.append(
            f"Differences in {_SCORE_TITLES[metric]} to {baseline} were tested by a paired $t$-test over the seeds"
            f"{describe_splits(rows)}."
        )
    if both:
        resampled = next(iter(scores.values())).scores
        images, resamples = resampled.influences.shape[1], resampled.resampled.shape[1]
        sentences.append(
            f"Differences to {baseline} in mAP as COCO defines it were tested by a paired bootstrap over the "
            f"{images:,} validation images ({resamples:,} resamples, average precision computed anew in each) with the "
            "variance between training seeds added to the standard error."
        )
    numbers = sorted({number for number in (paired, both) if number > 1}, reverse=True)
    if numbers:
        sentences.append(
            "The $p$-values and intervals of each test were corrected by Holm's procedure for "
            f"{join_words([str(number) for number in numbers])} comparisons."
        )
    if sentences:
        sentences.append(f"Differences with $p < {LEVEL:g}$ are called significant.")
    return sentences


def _describe_software(records: Sequence[RunRecord]) -> list[str]:
    """Return a sentence on the versions of the software and the device, if they are known."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record.versions.items():
            if value:
                values.setdefault(name, {})[value] = None
    devices = values.pop("device", {})
    systems = values.pop("system", {})
    software = [f"{_SOFTWARE.get(name, name)} {join_words(list(found))}" for name, found in values.items()]
    if not software:
        return []
    place = (f", on {join_words(list(systems))}" if systems else "") + (
        f" ({join_words(list(devices))})" if devices else ""
    )
    return [escape_latex(f"Software: {join_words(software)}{place}.")]
