"""Compare evaluations of two or more models on the same images."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from cpm_rcnn.evaluation.bootstrap import compare_matches, match_all
from cpm_rcnn.evaluation.records import DETECTIONS, check_comparable, class_names, read_detections, read_evaluation
from cpm_rcnn.reporting.comparison import print_comparison, write_comparison


def compare_runs(sources: list[Path], given: Path | None, samples: int, seed: int) -> None:
    """Compare evaluations; the results are written to Hydra's output folder.

    Args:
        sources: folders of ``eval``, or ``detections.json`` files.
        given: the annotations to use in place of those that the evaluations name; None uses the latter.
        samples: number of bootstrap samples.
        seed: random seed of the bootstrap.

    Raises:
        UserError: a source cannot be read, or the evaluations cannot be compared.
    """
    given = None if given is None else given.absolute()
    evaluations = [read_evaluation(source, given) for source in sources]
    annotations = check_comparable(evaluations)
    classes = class_names(evaluations[0], annotations)
    data = [read_detections(evaluation, annotations) for evaluation in evaluations]
    results = compare_matches([match_all(each) for each in data], classes, samples, seed)
    comparison = {
        "annotations": str(evaluations[0].annotations),
        "images": data[0].images,
        "samples": samples,
        "seed": seed,
        "confidence": 0.95,
        "runs": [
            {"name": name, "source": str(evaluation.source.absolute()), **result}
            for name, evaluation, result in zip(_names(sources), evaluations, results)
        ],
    }
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    write_comparison(comparison, run_dir)
    print_comparison(comparison)
    print(run_dir)


def _names(sources: list[Path]) -> list[str]:
    """The names of the folders; if several are equal, their paths without the folders that all have in common."""
    paths = [source.absolute() for source in sources]
    paths = [path.parent if path.name == DETECTIONS else path for path in paths]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    if len(set(paths)) == len(paths):
        common = os.path.commonpath([path.parent for path in paths])
        return [os.path.relpath(path, common) for path in paths]
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]
